"""Dice, the activation of DIN (Zhou et al., KDD 2018):  p x + (1 - p) alpha x,  p = sigmoid((x - mean) / std).

alpha is learned per channel. The paper takes mean and std from the current batch in training, as batch
normalisation does. Here they are running averages over earlier batches in training, too: a row's score does not depend
on the other rows of its batch, training and serving compute the same function, and all workers use the same averages.

Shape legend: T rows, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recray.kernels.dice import dice

_MOMENTUM = 0.1
_EPSILON = 1e-6


class Dice(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((channels,), 0.25))
        self.mean: Tensor
        self.var: Tensor
        self.batches: Tensor
        self.seen: Tensor
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        # Of this worker since the last `sync`: sums of x, of x squared, and the number of rows.
        self.register_buffer("seen", torch.zeros(2 * channels + 1, dtype=torch.float64), persistent=False)

    def gate(self) -> tuple[Tensor, Tensor]:
        """(C,), (C,): scale and shift with p = sigmoid(scale x + shift)."""
        scale_C = torch.rsqrt(self.var + _EPSILON)
        return scale_C, -self.mean * scale_C

    def forward(self, x_TC: Tensor) -> Tensor:
        """(T, C)"""
        if self.training:
            x = x_TC.detach().float()
            self.see(torch.stack([x.sum(0), (x * x).sum(0)]), x.new_tensor(float(len(x))))
        return dice(x_TC, self.alpha, *self.gate())

    def see(self, sums_2C: Tensor, rows: Tensor) -> None:
        """Sums of x and of x squared over so many rows, for the next `sync`."""
        self.seen += torch.cat([sums_2C.flatten(), rows.view(1)])

    def move(self, total: Tensor) -> None:
        """Move the averages towards what all workers saw: `total` is the sum of their `seen`."""
        any_rows = (total[-1] > 0).to(self.mean.dtype)  # a batch of empty histories has no entries
        mean_C, square_C = (total[:-1] / total[-1].clamp(min=1)).view(2, -1)
        self.batches += any_rows.to(torch.int64)
        # The first batches weigh as much as all before them, so that nothing of the start (0, 1) is left.
        step = any_rows * torch.clamp(1 / self.batches.clamp(min=1), min=_MOMENTUM).to(self.mean.dtype)
        self.mean.lerp_(mean_C.to(self.mean.dtype), step)
        self.var.lerp_((square_C - mean_C**2).clamp(min=0).to(self.var.dtype), step)
        self.seen.zero_()


@torch.no_grad()
def sync(module: nn.Module) -> None:
    """After a step: move the averages of every Dice of a module. One exchange for all of them, and none in a forward,
    where workers would wait for the slowest of them again and again."""
    found = [m for m in module.modules() if isinstance(m, Dice)]
    if not found:
        return
    total = torch.cat([m.seen for m in found])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    for m, part in zip(found, torch.split(total, [len(m.seen) for m in found]), strict=True):
        m.move(part)


def forget(module: nn.Module) -> None:
    """Drop what was seen in a step that is begun anew."""
    for m in module.modules():
        if isinstance(m, Dice):
            m.seen.zero_()
