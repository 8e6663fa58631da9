"""Precision, optimiser, schedule and averaged weights: all that needs a dtype or a scaler."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from recray.config import OptimConfig
from recray.errors import ConfigError


def precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of autocast; float32 means none. 'auto': fp32 on CPU, bf16 on GPUs that have it, else fp16."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if dtype is torch.float16 and device.type != "cuda":
        raise ConfigError("training.precision = 'fp16' needs a GPU: use 'auto', 'fp32' or 'bf16' on a CPU")
    return dtype


class Optimizers:
    """One step for all parameters: those with dense gradients, and tables of which only touched rows are updated.

    A table with sparse gradients (`nn.Embedding(sparse=True)`) is updated by Adam on the rows that the batch touched;
    rows that it did not keep their moments (torch.optim.SparseAdam), or by plain SGD.
    """

    def __init__(self, config: OptimConfig, model: nn.Module) -> None:
        embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        self._sparse = [m.weight for m in embeddings if m.sparse]
        sparse_ids = {id(p) for p in self._sparse}
        table_ids = {id(m.weight) for m in embeddings} - sparse_ids
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        dense = [p for p in self._parameters if id(p) not in sparse_ids]
        groups = [
            {"params": [p for p in dense if id(p) not in table_ids], "weight_decay": config.weight_decay},
            {
                "params": [p for p in dense if id(p) in table_ids],
                "weight_decay": config.embedding_decay or config.weight_decay,
            },
        ]
        groups = [group for group in groups if group["params"]]
        self._decay = config.embedding_decay
        self._parts: list[torch.optim.Optimizer] = []
        if config.name == "sgd":
            self._parts += [torch.optim.SGD(groups, config.learning_rate)] if groups else []
            self._parts += [torch.optim.SGD(self._sparse, config.learning_rate)] if self._sparse else []
        else:
            kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
            self._parts += [kind(groups, config.learning_rate, fused=True)] if groups else []
            self._parts += [torch.optim.SparseAdam(self._sparse, config.learning_rate)] if self._sparse else []

    def set_learning_rate(self, value: float) -> None:
        self._learning_rate = value
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = value

    @torch.no_grad()
    def clip(self, scaler: torch.amp.GradScaler, largest: float) -> None:
        """Scale all gradients so that their global norm is at most `largest` (torch's own clips no sparse ones)."""
        for part in self._parts:
            scaler.unscale_(part)
        gradients = []
        for parameter in self._parameters:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()
                gradients.append(parameter.grad._values())
            elif parameter.grad is not None:
                gradients.append(parameter.grad)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
        for gradient in gradients:
            gradient.mul_((largest / (norm + 1e-6)).clamp(max=1.0))

    def step(self, scaler: torch.amp.GradScaler) -> None:
        """Update, and forget the gradients."""
        for weight in self._sparse if self._decay else ():
            if weight.grad is not None:
                rows = weight.grad.coalesce().indices()[0]
                weight.data[rows] *= 1 - self._learning_rate * self._decay
        for part in self._parts:
            scaler.step(part)
        scaler.update()
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self._parts]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        for part, entry in zip(self._parts, state, strict=True):
            part.load_state_dict(entry)


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Linear warm-up over warmup_steps, then constant, or falling to 0 at total_steps linearly or as a half cosine."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    done = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    return config.learning_rate * ((1 - done) if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


class Ema:
    """Exponential moving average of a module's weights; decay 0 keeps none and `weights` are the module's own."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self.decay = module, decay
        self.shadow: dict[str, Tensor] = {}
        if decay:
            self.shadow = {n: t.detach().clone() for n, t in module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        for name, tensor in self._module.state_dict().items() if self.decay else ():
            if tensor.is_floating_point():
                self.shadow[name].lerp_(tensor, 1 - self.decay)

    def weights(self) -> dict[str, Tensor]:
        return self.shadow if self.decay else self._module.state_dict()
