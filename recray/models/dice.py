"""Dice, the activation of DIN (Zhou et al., KDD 2018):  p x + (1 - p) alpha x,  p = sigmoid((x - mean) / std).

Mean and std are running averages over batches in training too, not those of the batch
at hand. A row's score then does not depend on the rows it came with, training and
serving compute the same function, and workers agree.

Shape legend: T rows, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_MOMENTUM = 0.1
_EPSILON = 1e-6


class Dice(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((channels,), 0.25))
        self.mean: Tensor
        self.var: Tensor
        self.batches: Tensor
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def gate(self) -> tuple[Tensor, Tensor]:
        """(C,), (C,): scale and shift of the sigmoid's input."""
        scale_C = torch.rsqrt(self.var + _EPSILON)
        return scale_C, -self.mean * scale_C

    def forward(self, x_TC: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                x = x_TC.float()
                self.update(torch.stack([x.sum(0), (x * x).sum(0)]), len(x))
        scale_C, shift_C = self.gate()
        p_TC = torch.sigmoid(torch.addcmul(shift_C, x_TC, scale_C))
        return x_TC * (self.alpha + (1 - self.alpha) * p_TC)

    @torch.no_grad()
    def update(self, sums_2C: Tensor, rows: int) -> None:
        """Move the averages towards this batch's, over all workers: sums of x and of x squared over `rows` rows."""
        total = torch.cat([sums_2C.flatten(), sums_2C.new_tensor([float(rows)])]).double()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        any_rows = (total[-1] > 0).to(self.mean.dtype)  # a batch of empty histories has no entries
        mean_C, square_C = (total[:-1] / total[-1].clamp(min=1)).view(2, -1)
        self.batches += any_rows.to(torch.int64)
        # The first batches weigh as much as all before them, so that nothing of the start (0, 1) is left.
        step = any_rows * torch.clamp(1 / self.batches, min=_MOMENTUM).to(self.mean.dtype)
        self.mean.lerp_(mean_C.to(self.mean.dtype), step)
        self.var.lerp_((square_C - mean_C**2).clamp(min=0).to(self.var.dtype), step)
