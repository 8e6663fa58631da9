"""Precision, optimiser, schedule and averaged weights: all that needs a dtype or a scaler."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from recray.config import OptimConfig
from recray.errors import ConfigError
from recray.layers import collectives, embedding
from recray.training import fsdp
from recray.training.sparse_optim import SparseOptimizer, Update


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
    """One step for all parameters: those with dense gradients, and tables of which only touched rows are updated."""

    def __init__(self, config: OptimConfig, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding) and module.sparse and not isinstance(module, embedding.Table):
                raise ConfigError(
                    f"'{name}' of the model is an nn.Embedding(sparse=True): make it a recray.layers.embedding.Table, whose "
                    f"gradients of touched rows cross workers"
                )
        self._tables = embedding.tables(model)
        self._shared_out = {id(t.weight) for t in embedding.sharded(model).values() if t.world_size > 1}
        sparse = [table.weight for table in self._tables.values()]
        sparse_ids = {id(p) for p in sparse}
        table_ids = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - sparse_ids
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
        self._dense: torch.optim.Optimizer | None = None
        if groups and config.name == "sgd":
            self._dense = torch.optim.SGD(groups, config.learning_rate)
        elif groups:
            kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
            self._dense = kind(groups, config.learning_rate, fused=True)
        update: Update = "sgd" if config.name == "sgd" else "adam"
        update = "adagrad" if config.table_optimizer == "adagrad" else update
        self._touched = SparseOptimizer(sparse, update, config.embedding_decay) if sparse else None
        self._table_rate = (config.table_learning_rate or config.learning_rate) / config.learning_rate
        self._parts = [part for part in (self._dense, self._touched) if part is not None]

    def set_learning_rate(self, value: float) -> None:
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = value * (self._table_rate if part is self._touched else 1.0)

    @torch.no_grad()
    def clip(self, scaler: torch.amp.GradScaler, largest: float) -> None:
        """Scale all gradients so that their global norm is at most `largest` (torch's own clips no sparse ones)."""
        for part in self._parts:
            scaler.unscale_(part)
        gradients, squares = [], [torch.zeros((), device=self._parameters[0].device) for _ in range(2)]
        shared_out = self._shared_out | {id(p) for p in self._parameters if fsdp.is_part(p)}
        for parameter in self._parameters:
            if parameter.grad is None:
                continue
            gradient = parameter.grad._values() if parameter.grad.is_sparse else fsdp.local(parameter.grad)
            gradients.append(gradient)
            squares[id(parameter) in shared_out] += torch.linalg.vector_norm(gradient) ** 2
        everywhere, here = squares
        norm = (everywhere + (collectives.total(here) if shared_out else here)).sqrt()
        for gradient in gradients:
            gradient.mul_((largest / (norm + 1e-6)).clamp(max=1.0))

    def step(self, scaler: torch.amp.GradScaler) -> None:
        """Update, and forget the gradients."""
        for part in self._parts:
            scaler.step(part)
        scaler.update()
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Of dense parameters, all of them; tables' is `table_state`. All workers must ask together."""
        state: dict[str, Any] = {} if self._dense is None else fsdp.whole(self._dense.state_dict())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._dense is None:
            return
        parameters = [p for group in self._dense.param_groups for p in group["params"]]
        kept = {
            number: {key: fsdp.like(x, parameters[number]) if isinstance(x, Tensor) else x for key, x in one.items()}
            for number, one in state["state"].items()
        }
        self._dense.load_state_dict(state | {"state": kept})

    def table_state(self) -> dict[str, dict[str, Any]]:
        """By table: tensors with an entry per row that is here, and how many steps were taken."""
        return {name: dict(self._touched.state[table.weight]) for name, table in self._tables.items() if self._touched}

    def load_table_state(self, name: str, state: dict[str, Any]) -> None:
        assert self._touched is not None
        self._touched.state[self._tables[name].weight] = state


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
