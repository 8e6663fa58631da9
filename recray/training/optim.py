"""Mixed precision, optimizers, learning rate schedule, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recray.config import Config, OptimConfig
from recray.errors import ConfigError
from recray.layers import collectives, embedding
from recray.training import fsdp
from recray.training.sparse_optim import SparseOptimizer, Update


class MixedPrecision:
    """The dtype of forwards, and the loss scale that fp16 needs: its gradients underflow otherwise."""

    def __init__(self, name: str, device: torch.device) -> None:
        """name: training.precision. Raises ConfigError for fp16 without a GPU."""
        self.dtype = _dtype(name, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self._device = device

    def autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, self.dtype, enabled=self.dtype is not torch.float32)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' is fp32 on a CPU, and on a GPU bf16 where it is supported, else fp16."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if dtype is torch.float16 and device.type != "cuda":
        raise ConfigError("training.precision = 'fp16' needs a GPU: use 'auto', 'fp32' or 'bf16' on a CPU")
    return dtype


def steadier(config: Config, device: torch.device) -> str:
    """What to change where training diverges."""
    half = _dtype(config.training.precision, device) is not torch.float32
    advice = ["lower optim.learning_rate"]
    advice += [] if config.optim.clip_norm else ["set optim.clip_norm = 1.0"]
    advice += ["set training.precision = 'fp32'"] if half else []
    return ", or ".join(advice)


class Optimizers:
    """One step for all parameters: those with dense gradients, and tables of which a step updates only some rows."""

    def __init__(self, config: OptimConfig, model: nn.Module) -> None:
        _refuse_plain_sparse(model)
        self._tables = embedding.tables(model)
        sparse = [table.weight for table in self._tables.values()]
        self._sharded_ids = {id(t.weight) for t in embedding.sharded(model).values() if t.world_size > 1}
        self._names = dict(model.named_parameters())
        self._parameters = [p for p in self._names.values() if p.requires_grad]
        self._dense = _dense_optimizer(config, model, {id(weight) for weight in sparse})
        update: Update = "sgd" if config.name == "sgd" else "adam"
        update = "adagrad" if config.table_optimizer == "adagrad" else update
        self._sparse = SparseOptimizer(sparse, update, config.embedding_decay) if sparse else None
        self._table_rate = (config.table_learning_rate or config.learning_rate) / config.learning_rate
        self._parts = [part for part in (self._dense, self._sparse) if part is not None]
        self._joint: Any = _Joint(self._parts) if len(self._parts) != 1 else self._parts[0]

    def set_learning_rate(self, value: float) -> None:
        """Of the next step; tables keep the ratio of optim.table_learning_rate to optim.learning_rate."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = value * (self._table_rate if part is self._sparse else 1.0)

    @torch.no_grad()
    def clip(self, scaler: torch.amp.GradScaler, max_norm: float) -> None:
        """Scale all gradients so that their global norm is at most `max_norm`. (torch's own clipping skips sparse ones.)"""
        scaler.unscale_(self._joint)
        gradients: list[Tensor] = []
        replicated, sharded = (torch.zeros((), device=self._parameters[0].device) for _ in range(2))
        sharded_ids = self._sharded_ids | {id(p) for p in self._parameters if fsdp.is_part(p)}
        for parameter in self._parameters:
            if parameter.grad is None:
                continue
            gradient = parameter.grad._values() if parameter.grad.is_sparse else fsdp.local(parameter.grad)
            gradients.append(gradient)
            squares = sharded if id(parameter) in sharded_ids else replicated
            squares += torch.linalg.vector_norm(gradient) ** 2
        # Replicated gradients are the same on all workers; of sharded ones each worker has its own part.
        norm = (replicated + (collectives.total(sharded) if sharded_ids else sharded)).sqrt()
        for gradient in gradients:
            gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))

    def step(self, scaler: torch.amp.GradScaler) -> None:
        """Update the weights, and drop the gradients. Under fp16 the step is skipped if a gradient overflowed."""
        scaler.step(self._joint)
        scaler.update()
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """State of the dense optimizer, with FSDP gathered from all workers, which must all call this."""
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

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors that the optimizers keep on this worker, such as 'item_table.weight (exp_avg)'."""
        names = {id(weight): name for name, weight in self._names.items()}
        for part in self._parts:
            for weight, state in part.state.items():
                yield from ((f"{names[id(weight)]} ({k})", x) for k, x in state.items() if isinstance(x, Tensor))

    def table_state(self) -> dict[str, dict[str, Any]]:
        """By table with sparse updates: its moments, with an entry per row of this worker, and its number of steps."""
        return {name: dict(self._sparse.state[table.weight]) for name, table in self._tables.items() if self._sparse}

    def load_table_state(self, name: str, state: dict[str, Any]) -> None:
        assert self._sparse is not None
        self._sparse.state[self._tables[name].weight] = state


class _Joint:
    """Several optimizers as one for a GradScaler, which skips the step of an optimizer whose gradients overflowed: either
    all of them step, or none."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self._parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self._parts for group in part.param_groups]

    def step(self) -> None:
        for part in self._parts:
            part.step()


def _dense_optimizer(config: OptimConfig, model: nn.Module, sparse_ids: set[int]) -> torch.optim.Optimizer | None:
    """Of all parameters but the sparse ones: embedding tables have a weight decay of their own."""
    dense = [p for p in model.parameters() if p.requires_grad and id(p) not in sparse_ids]
    table_ids = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    table_decay = config.embedding_decay or config.weight_decay
    groups = [
        {"params": [p for p in dense if id(p) not in table_ids], "weight_decay": config.weight_decay},
        {"params": [p for p in dense if id(p) in table_ids], "weight_decay": table_decay},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        return None
    if config.name == "sgd":
        return torch.optim.SGD(groups, config.learning_rate)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(groups, config.learning_rate, fused=True)


def _refuse_plain_sparse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.sparse and not isinstance(module, embedding.Table):
            raise ConfigError(
                f"'{name}' of the model is an nn.Embedding(sparse=True), whose gradients DDP cannot exchange: "
                f"use recray.layers.embedding.Table"
            )


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Of step 0, 1, ...: a linear warm-up over warmup_steps, then constant, or down to 0 at total_steps, as a line or half a cosine."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    done = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    return config.learning_rate * ((1 - done) if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


class Ema:
    """Exponential moving average of a module's weights: shadow = decay * shadow + (1 - decay) * weight after each step.

    With decay 0 nothing is kept, and `weights` are the module's own.
    """

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

    def load(self, weights: dict[str, Tensor]) -> None:
        """Set the averages; `weights` are those of all workers."""
        self.shadow = {name: fsdp.like(weights[name].to(own.device), own) for name, own in self.shadow.items()}
