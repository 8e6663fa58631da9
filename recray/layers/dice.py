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
        # Of this worker since the last `sync`: sums of x, of x squared, and the number of rows.
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
