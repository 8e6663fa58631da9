"""Dropout on a CPU with 8 random bits per element, in a quarter of the time of `F.dropout`.

`F.dropout` calls the random generator for every element, and on a CPU those calls take most of its time. One 64-bit
draw decides about eight elements here. Eight bits express multiples of 1/256 only, so each call rounds p * 256 up or
down at random, and over many calls the rate is p:

    p = 0.1: p * 256 = 25.6, so a call drops an element with probability 25/256 (four calls of ten) or 26/256 (six)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """x with elements set to 0 with probability p and the others scaled so that the mean stays; x itself outside training."""
    fast = x.device.type == "cpu" and 0 < p <= 255 / 256 and not torch.compiler.is_compiling()
    if not (training and fast):
        return F.dropout(x, p, training)
    out: Tensor = _Dropout.apply(x, *draw(x, p))
    return out


def draw(x: Tensor, p: float) -> tuple[Tensor, int]:
    """Random bytes in the shape of x, and the threshold below which a byte drops its element."""
    threshold = int(p * 256 + torch.rand(()).item())
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    return words.view(torch.uint8)[: x.numel()].view(x.shape), threshold


def reference(x: Tensor, bits: Tensor, threshold: int) -> Tensor:
    return torch.where(bits >= threshold, x * (256 / (256 - threshold)), 0.0)


class _Dropout(torch.autograd.Function):
    """Saves one byte per element for backward, where autograd would save a mask of floats."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: Tensor, threshold: int) -> Tensor:
        ctx.save_for_backward(bits)
        ctx.threshold = threshold
        return _apply(x, bits, threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (bits,) = ctx.saved_tensors
        return _apply(grad, bits, ctx.threshold), None, None


def _apply(x: Tensor, bits: Tensor, threshold: int) -> Tensor:
    # The comparison writes 0.0 and 1.0: a product with floats takes a third of the time of one with booleans.
    mask = torch.ge(bits, threshold, out=torch.empty_like(x, memory_format=torch.contiguous_format))
    return mask.mul_(x).mul_(256 / (256 - threshold))
