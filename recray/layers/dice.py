"""Dice, the activation of DIN (Zhou et al., KDD 2018):  p x + (1 - p) alpha x,  p = sigmoid((x - mean) / std).

Mean and std are running averages over earlier batches in training too, not those of the
batch at hand. A row's score then does not depend on the rows it came with, training and
serving compute the same function, and workers agree.

Shape legend: T rows, C channels.
"""

from __future__ import annotations

from typing import Any

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
        self.seen: Tensor
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        # What this worker saw in the current step: sums of x, sums of x squared, and the number of rows.
        self.register_buffer("seen", torch.zeros(2 * channels + 1, dtype=torch.float64), persistent=False)

    def gate(self) -> tuple[Tensor, Tensor]:
        """(C,), (C,): scale and shift of the sigmoid's input."""
        scale_C = torch.rsqrt(self.var + _EPSILON)
        return scale_C, -self.mean * scale_C

    def forward(self, x_TC: Tensor) -> Tensor:
        if self.training:
            x = x_TC.detach().float()
            self.see(torch.stack([x.sum(0), (x * x).sum(0)]), x.new_tensor(float(len(x))))
        out: Tensor = _Dice.apply(x_TC, self.alpha, *self.gate())  # type: ignore[no-untyped-call]
        return out

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


class Curve:
    """Dice of C channels with their averages as they are now, and its derivative, times `factor` of each channel.

    Made once for many calls: on a small vector an operation costs as much as on a thousand times as many numbers.
    """

    def __init__(self, scale: Tensor, shift: Tensor, alpha: Tensor, factor: Tensor | float = 1.0) -> None:
        self._scale, self._shift, self._alpha, self.rest = scale, shift, alpha, 1 - alpha
        # d/dx of alpha x + (1 - alpha) x p(x): alpha + p ((1 - alpha) + (1 - p) x (1 - alpha) scale)
        self._slope = (alpha * factor, self.rest * factor, self.rest * scale * factor)

    def gate(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """p"""
        return torch.addcmul(self._shift, x, self._scale, out=out).sigmoid_()

    def value(self, x: Tensor, p: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.addcmul(self._alpha, p, self.rest, out=out).mul_(x)

    def closed(self, x: Tensor, p: Tensor, out: Tensor | None = None) -> Tensor:
        """y = (1 - p) x, the derivative with respect to alpha; the value is x - (1 - alpha) y."""
        return torch.addcmul(x, p, x, value=-1, out=out)

    def value_of(self, x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.addcmul(x, y, self.rest, value=-1, out=out)

    def slope(self, y: Tensor, p: Tensor, out: Tensor | None = None) -> Tensor:
        """The derivative with respect to x, times `factor`."""
        alpha, rest, scaled = self._slope
        return torch.addcmul(alpha, torch.addcmul(rest, y, scaled, out=out), p, out=out)


class _Dice(torch.autograd.Function):
    """Half the passes over memory that autograd would make of the formula."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, scale: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        curve = Curve(scale.to(x.dtype), shift.to(x.dtype), alpha.to(x.dtype))
        p = curve.gate(x)
        ctx.curve = curve
        ctx.save_for_backward(x, p)
        return curve.value(x, p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, p = ctx.saved_tensors
        y = ctx.curve.closed(x, p)
        return ctx.curve.slope(y, p, torch.empty_like(y)).mul_(grad), y.mul_(grad).sum(0), None, None
