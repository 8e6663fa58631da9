"""DIN's attention over jagged histories: a small MLP on (candidate, history item) for every entry.

The first layer over [q, k, q - k, q * k] is split by linearity (the same function):

    W [q, k, q - k, q * k] = (Wq + Wd) q  +  (Wk - Wd) k  +  Wp (q * k)

The first part is computed once a row, the second once a distinct item, only the third
for every entry. On a CPU entries go through in chunks that stay in its cache, and
backward makes the chunk's activations again: a batch's activations would be hundreds of
megabytes, and fresh memory costs more than the arithmetic.

Shape legend: B rows, T history entries, U distinct items, I item width, C and H
channels of the two layers, n entries of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recray.models.batch import Jagged
from recray.models.dice import Dice

_CHUNK = 8_192  # entries; two or three tensors of 64 channels fit a core's share of the cache


class TargetAttention(nn.Module):
    """Weighted sum of each row's history, weights by an MLP with Dice on candidate and entry; not normalised."""

    def __init__(self, width: int, first: int, second: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, first)  # Wq + Wd, and the bias
        self.key = nn.Linear(width, first, bias=False)  # Wk - Wd
        self.product = nn.Linear(width, first, bias=False)  # Wp
        self.dice_1, self.dice_2 = Dice(first), Dice(second)
        self.second = nn.Linear(first, second)
        self.out = nn.Linear(second, 1)

    def forward(self, q_BI: Tensor, v_UI: Tensor, history: Jagged) -> Tensor:
        """(B, I). history: indices into v_UI, oldest first. An empty history gives zeros."""
        row_T = torch.repeat_interleave(torch.arange(len(q_BI), device=q_BI.device), history.lengths())
        c_BC, u_UC = self.query(q_BI), self.key(v_UI)
        if q_BI.device.type != "cpu":
            return self._whole(q_BI, v_UI, c_BC, u_UC, history, row_T)
        gates = (*self.dice_1.gate(), *self.dice_2.gate())
        out_BI, sums_1, sums_2 = _Chunked.apply(  # type: ignore[no-untyped-call]
            *(x.to(self.query.weight.dtype) for x in (q_BI, v_UI, c_BC, u_UC)),  # autocast may have made them narrower
            *(self.product.weight, self.dice_1.alpha, self.second.weight, self.second.bias),
            *(self.dice_2.alpha, self.out.weight, self.out.bias),
            *(history.values, row_T, *gates),
        )
        if self.training:
            self.dice_1.update(sums_1, len(row_T))
            self.dice_2.update(sums_2, len(row_T))
        return out_BI  # type: ignore[no-any-return]

    def _whole(self, q_BI: Tensor, v_UI: Tensor, c_BC: Tensor, u_UC: Tensor, history: Jagged, row_T: Tensor) -> Tensor:
        """All entries at once, for devices that have the memory and its speed."""
        k_TI = v_UI[history.values]
        x_TC = c_BC[row_T] + u_UC[history.values] + self.product(q_BI[row_T] * k_TI)
        w_T1 = self.out(self.dice_2(self.second(self.dice_1(x_TC))))
        return torch.zeros_like(q_BI).index_add(0, row_T, (w_T1 * k_TI).to(q_BI.dtype))


def _dice(x: Tensor, alpha: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Dice of x, and its p."""
    p = torch.addcmul(shift, x, scale).sigmoid_()
    return torch.addcmul(alpha, p, 1 - alpha).mul_(x), p


def _dice_grad(grad: Tensor, x: Tensor, p: Tensor, alpha: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients with respect to x and alpha."""
    rest = 1 - p
    d_alpha = (grad * x * rest).sum(0)
    # d/dx of alpha x + (1 - alpha) x p(x): alpha + (1 - alpha) p (1 + x (1 - p) scale)
    slope = (rest.mul_(x).mul_(scale).add_(1)).mul_(p)
    return torch.addcmul(alpha, slope, 1 - alpha).mul_(grad), d_alpha


class _Chunked(torch.autograd.Function):
    """(sum of weighted history (B, I), and for Dice: sums and sums of squares of both layers' inputs)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        v: Tensor,
        c: Tensor,
        u: Tensor,
        wp: Tensor,
        alpha_1: Tensor,
        w2: Tensor,
        b2: Tensor,
        alpha_2: Tensor,
        w3: Tensor,
        b3: Tensor,
        index_T: Tensor,
        row_T: Tensor,
        *gates: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = torch.zeros_like(q)
        sums_1, sums_2 = q.new_zeros(2, wp.shape[0]), q.new_zeros(2, w2.shape[0])
        w_T = q.new_empty(len(index_T))
        ctx.parameters = (wp, alpha_1, w2, b2, alpha_2, w3, b3)
        ctx.gates = gates
        for at in range(0, len(index_T), _CHUNK):
            part = slice(at, at + _CHUNK)
            index, row = index_T[part], row_T[part]
            k, _, x1, _, _, x2, _, a2 = _activations(q, v, c, u, ctx.parameters, gates, index, row)
            for x, sums in ((x1, sums_1), (x2, sums_2)):
                sums[0] += x.sum(0)
                sums[1] += x.square().sum(0)
            w = torch.addmv(b3, a2, w3[0])
            w_T[part] = w
            out.index_add_(0, row, k.mul_(w[:, None]))
        ctx.save_for_backward(q, v, c, u, index_T, row_T, w_T)
        ctx.mark_non_differentiable(sums_1, sums_2)
        return out, sums_1, sums_2

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, v, c, u, index_T, row_T, w_T = ctx.saved_tensors
        wp, alpha_1, w2, _, alpha_2, w3, _ = ctx.parameters
        scale_1, _, scale_2, _ = ctx.gates
        dq, dv, dc, du = (torch.zeros_like(x) for x in (q, v, c, u))
        d_parameters = [torch.zeros_like(p) for p in ctx.parameters]
        dwp, d_alpha_1, dw2, db2, d_alpha_2, dw3, db3 = d_parameters
        for at in range(0, len(index_T), _CHUNK):
            part = slice(at, at + _CHUNK)
            index, row = index_T[part], row_T[part]
            k, q_row, x1, p1, a1, x2, p2, a2 = _activations(q, v, c, u, ctx.parameters, ctx.gates, index, row)
            g = grad_out.index_select(0, row)
            dw = (g * k).sum(1)
            db3 += dw.sum()
            dw3[0] += dw @ a2
            dx2, d_alpha = _dice_grad(torch.outer(dw, w3[0]), x2, p2, alpha_2, scale_2)
            d_alpha_2 += d_alpha
            db2 += dx2.sum(0)
            dw2.addmm_(dx2.T, a1)
            dx1, d_alpha = _dice_grad(dx2 @ w2, x1, p1, alpha_1, scale_1)
            d_alpha_1 += d_alpha
            dwp.addmm_(dx1.T, q_row * k)
            dqk = dx1 @ wp
            dc.index_add_(0, row, dx1)
            du.index_add_(0, index, dx1)
            dq.index_add_(0, row, dqk * k)
            dv.index_add_(0, index, dqk.mul_(q_row).add_(g.mul_(w_T[part][:, None])))
        return (dq, dv, dc, du, *d_parameters, *([None] * (2 + len(ctx.gates))))


def _activations(
    q: Tensor,
    v: Tensor,
    c: Tensor,
    u: Tensor,
    parameters: tuple[Tensor, ...],
    gates: tuple[Tensor, ...],
    index: Tensor,
    row: Tensor,
) -> tuple[Tensor, ...]:
    """Of one chunk: k, q of its rows, and input, p and output of both layers (the first's output once)."""
    wp, alpha_1, w2, b2, alpha_2, _, _ = parameters
    scale_1, shift_1, scale_2, shift_2 = gates
    k, q_row = v.index_select(0, index), q.index_select(0, row)
    x1 = c.index_select(0, row).add_(u.index_select(0, index)).addmm_(q_row * k, wp.T)
    a1, p1 = _dice(x1, alpha_1, scale_1, shift_1)
    x2 = F.linear(a1, w2, b2)
    a2, p2 = _dice(x2, alpha_2, scale_2, shift_2)
    return k, q_row, x1, p1, a1, x2, p2, a2
