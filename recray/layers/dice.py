"""Dice, the activation of DIN (Zhou et al., KDD 2018):  p x + (1 - p) alpha x,  p = sigmoid((x - mean) / std).

alpha is learned per channel. The paper takes mean and std from the current batch in training, as batch
normalisation does. Here they are running averages over earlier batches in training, too: a row's score does not depend
on the other rows of its batch, training and serving compute the same function, and all workers use the same averages.

Shape legend: T rows, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recray.kernels.dice import Curve, dice

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
        # What this worker saw in the current step: sums of x, sums of x squared, and the number of rows.
        self.register_buffer("seen", torch.zeros(2 * channels + 1, dtype=torch.float64), persistent=False)

    def gate(self) -> tuple[Tensor, Tensor]:
        """(C,), (C,): scale and shift with p = sigmoid(scale x + shift)."""
        scale_C = torch.rsqrt(self.var + _EPSILON)
        return scale_C, -self.mean * scale_C

    def curve(self) -> Curve:
        """The function with the averages that it has now, for inference."""
        return Curve(*self.gate(), self.alpha)

    def forward(self, x_TC: Tensor) -> Tensor:
        """(T, C)"""
        if self.training:
            x = x_TC.detach().float()
            self.see(torch.stack([x.sum(0), (x * x).sum(0)]), x.new_tensor(float(len(x))))
        return dice(x_TC, self.alpha, *self.gate())

    def see(self, sums_2C: Tensor, rows: Tensor) -> None:
        """Add sums of x and of x squared over `rows` rows to what this step saw."""
        self.seen += torch.cat([sums_2C.flatten(), rows.view(1)])

    def after_backward(self, scaled: bool) -> Tensor:
        """StepHook: what this worker saw in the step. No exchange in the forward, where workers would wait for the
        slowest of them in every layer."""
        return self.seen

    def after_sum(self, total: Tensor) -> None:
        """StepHook: move the averages toward the mean and the variance of what all workers saw."""
        any_rows = (total[-1] > 0).to(self.mean.dtype)  # a batch of empty histories has no entries
        mean_C, square_C = (total[:-1] / total[-1].clamp(min=1)).view(2, -1)
        self.batches += any_rows.to(torch.int64)
        # Step size 1, 1/2, 1/3, ... at first: the mean of the batches so far, without the initial values (0, 1).
        step = any_rows * torch.clamp(1 / self.batches.clamp(min=1), min=_MOMENTUM).to(self.mean.dtype)
        self.mean.lerp_(mean_C.to(self.mean.dtype), step)
        self.var.lerp_((square_C - mean_C**2).clamp(min=0).to(self.var.dtype), step)
        self.seen.zero_()

    def discard(self) -> None:
        """StepHook: forget what was seen in a step that starts again."""
        self.seen.zero_()
