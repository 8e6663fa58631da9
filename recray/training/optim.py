"""Precision, optimiser, schedule and averaged weights: all that needs a dtype or a scaler."""

from __future__ import annotations

import math
from collections.abc import Iterable

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


def build(config: OptimConfig, parameters: Iterable[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    chosen = [p for p in parameters if p.requires_grad]
    if config.name == "sgd":
        return torch.optim.SGD(chosen, config.learning_rate, weight_decay=config.weight_decay)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(chosen, config.learning_rate, weight_decay=config.weight_decay, fused=True)


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
