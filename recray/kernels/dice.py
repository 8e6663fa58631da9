"""Dice in half the passes over memory that autograd makes of its formula. Used on every device.

    dice(x) = p x + (1 - p) alpha x,   p = sigmoid(scale x + shift)

For backward only x and p are saved. Both gradients are short in terms of y = (1 - p) x:

    d dice / d alpha = y              d dice / d x = alpha + p ((1 - alpha) + (1 - alpha) scale y)

scale and shift come from running averages and have no gradient. Shapes: x (T, C); all other tensors (C,).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def dice(x_TC: Tensor, alpha: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(T, C), equal to `reference` up to rounding."""
    out: Tensor = _Dice.apply(x_TC, alpha, scale, shift)
    return out


def reference(x_TC: Tensor, alpha: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    p = torch.sigmoid(x_TC * scale + shift)
    return p * x_TC + (1 - p) * alpha * x_TC


class Curve:
    """The function and its derivatives for fixed scale, shift and alpha; derivatives are multiplied by `factor` (C,).

    Terms that depend on channels only are computed once: on a vector of a few channels, an operation costs as much as on
    a thousand times as many numbers, and target attention (recray.kernels.target_attention) calls this per chunk of rows.
    Every method writes to `out` if it is given.
    """

    def __init__(self, scale: Tensor, shift: Tensor, alpha: Tensor, factor: Tensor | float = 1.0) -> None:
        self._scale, self._shift, self._alpha, self.rest = scale, shift, alpha, 1 - alpha
        self._slope = (alpha * factor, self.rest * factor, self.rest * scale * factor)

    def gate(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """p"""
        return torch.addcmul(self._shift, x, self._scale, out=out).sigmoid_()

    def value(self, x: Tensor, p: Tensor, out: Tensor | None = None) -> Tensor:
        """dice(x) = (alpha + (1 - alpha) p) x"""
        return torch.addcmul(self._alpha, p, self.rest, out=out).mul_(x)

    def alpha_slope(self, x: Tensor, p: Tensor, out: Tensor | None = None) -> Tensor:
        """y = (1 - p) x, the derivative with respect to alpha, without `factor`."""
        return torch.addcmul(x, p, x, value=-1, out=out)

    def value_from_slope(self, x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        """dice(x) = x - (1 - alpha) y"""
        return torch.addcmul(x, y, self.rest, value=-1, out=out)

    def slope(self, y: Tensor, p: Tensor, out: Tensor | None = None) -> Tensor:
        """The derivative with respect to x, times `factor`."""
        alpha, rest, scaled = self._slope
        return torch.addcmul(alpha, torch.addcmul(rest, y, scaled, out=out), p, out=out)


class _Dice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        curve = Curve(scale.to(x.dtype), shift.to(x.dtype), alpha.to(x.dtype))
        p = curve.gate(x)
        ctx.curve = curve
        ctx.save_for_backward(x, p)
        return curve.value(x, p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, p = ctx.saved_tensors
        y = ctx.curve.alpha_slope(x, p)
        return ctx.curve.slope(y, p, torch.empty_like(y)).mul_(grad), y.mul_(grad).sum(0), None, None
