"""DIN's attention over jagged histories: a small MLP on (candidate, history item) for every entry.

The first layer over [q, k, q - k, q * k] is linear in k once q is given, so each row has one matrix of its own:

    W [q, k, q - k, q * k] + b  =  c + M' k,     c = (Wq + Wd) q + b     M' = (Wk - Wd) + Wp diag(q)

which is the same function for a quarter of the products. On a CPU rows go through in
chunks of about equal lengths that stay in its cache. Activations of the first chunks
are kept for backward; those of a larger batch are made again, so memory stays bounded.

Shape legend: B rows, U distinct items, I item width, C and H channels of the two
layers, R rows of a chunk, L entries of its longest row, T entries of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recray.models.batch import Jagged
from recray.models.dice import Dice, dice, dice_grad, dice_slope

_CHUNK = 8_192  # entries; two or three tensors of 64 channels fit a core's share of the cache
_KEPT = 32  # chunks whose activations wait for backward, 11 MB each with 64 and 32 channels
_SAMPLED = 6  # chunks that Dice learns its averages from, spread over all lengths


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
        # Every entry weighs 1 at first: attention begins as mean pooling and departs from it where the data says so.
        nn.init.zeros_(self.out.weight)
        nn.init.ones_(self.out.bias)

    def forward(self, q_BI: Tensor, v_UI: Tensor, history: Jagged) -> Tensor:
        """(B, I). history: indices into v_UI, oldest first. An empty history gives zeros."""
        if q_BI.device.type != "cpu":
            return self._whole(q_BI, v_UI, history)
        dtype = self.query.weight.dtype  # autocast may have made the vectors narrower
        out_BI, sums_1, sums_2, sampled = _Chunked.apply(  # type: ignore[no-untyped-call]
            *(q_BI.to(dtype), v_UI.to(dtype), self.query(q_BI).to(dtype), self.key.weight, self.product.weight),
            *(self.dice_1.alpha, self.second.weight, self.second.bias),
            *(self.dice_2.alpha, self.out.weight, self.out.bias),
            *(history, (*self.dice_1.gate(), *self.dice_2.gate())),
        )
        if self.training:
            self.dice_1.update(sums_1, sampled)
            self.dice_2.update(sums_2, sampled)
        return out_BI  # type: ignore[no-any-return]

    def _whole(self, q_BI: Tensor, v_UI: Tensor, history: Jagged) -> Tensor:
        """All entries at once, for devices that have the memory and its speed."""
        row_T = torch.repeat_interleave(torch.arange(len(q_BI), device=q_BI.device), history.lengths())
        k_TI = v_UI[history.values]
        x_TC = self.query(q_BI)[row_T] + self.key(v_UI)[history.values] + self.product(q_BI[row_T] * k_TI)
        w_T1 = self.out(self.dice_2(self.second(self.dice_1(x_TC))))
        return torch.zeros_like(q_BI).index_add(0, row_T, (w_T1 * k_TI).to(q_BI.dtype))


@dataclass(frozen=True)
class _Chunk:
    """Rows of similar lengths, padded to the longest."""

    rows_R: Tensor
    index_RL: Tensor  # of items; 0 where `real_RL` is 0
    real_RL: Tensor  # float, 1 or 0


def _chunks(history: Jagged, dtype: torch.dtype) -> list[_Chunk]:
    lengths_B, order_B = history.lengths().sort(descending=True)
    order_B = order_B[lengths_B > 0]
    longest = lengths_B.tolist()
    out, at = [], 0
    while at < len(order_B):
        rows_R = order_B[at : at + max(1, _CHUNK // longest[at])]
        place_L, starts_R = torch.arange(longest[at]), history.offsets[rows_R]
        real_RL = place_L[None] < (history.offsets[rows_R + 1] - starts_R)[:, None]
        index_RL = history.values[torch.where(real_RL, starts_R[:, None] + place_L[None], 0)]
        out.append(_Chunk(rows_R, index_RL, real_RL.to(dtype)))
        at += len(rows_R)
    return out


@dataclass(frozen=True)
class _Layers:
    """The gates of both Dices, and parameters."""

    gates: tuple[Tensor, Tensor, Tensor, Tensor]
    key_CI: Tensor
    product_CI: Tensor
    alpha_1: Tensor
    w2_HC: Tensor
    b2: Tensor
    alpha_2: Tensor
    w3_1H: Tensor
    b3: Tensor

    def activations(self, chunk: _Chunk, q_RI: Tensor, c_RC: Tensor, v_UI: Tensor) -> tuple[Tensor, ...]:
        """k (R, L, I), M' (R, C, I), then (R L, channels): input, p and output of both layers; and the weights (R, L)."""
        size, (scale_1, shift_1, scale_2, shift_2) = chunk.index_RL.shape, self.gates
        k = v_UI.index_select(0, chunk.index_RL.view(-1)).view(*size, -1)
        m = torch.addcmul(self.key_CI, q_RI[:, None], self.product_CI)
        x1 = torch.baddbmm(c_RC[:, None], k, m.transpose(1, 2)).view(-1, len(self.key_CI))
        a1, p1 = dice(x1, self.alpha_1, scale_1, shift_1)
        x2 = F.linear(a1, self.w2_HC, self.b2)
        a2, p2 = dice(x2, self.alpha_2, scale_2, shift_2)
        w = torch.addmv(self.b3, a2, self.w3_1H[0]).view(size).mul_(chunk.real_RL)
        return k, m, x1, p1, a1, x2, p2, a2, w


class _Chunked(torch.autograd.Function):
    """(B, I) weighted sums; and for Dice sums and sums of squares of both layers' inputs over so many sampled entries."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, v: Tensor, c: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *parameters, history, gates = rest
        layers = _Layers(gates, *parameters)
        ctx.parameters = parameters
        chunks = _chunks(history, q.dtype)
        out = torch.zeros_like(q)
        sums_1, sums_2 = q.new_zeros(2, len(layers.key_CI)), q.new_zeros(2, len(layers.w2_HC))
        sampled = q.new_zeros(())
        ctx.kept = []
        num_kept = _KEPT if any(ctx.needs_input_grad) else 0
        stride = -(-len(chunks) // _SAMPLED)
        for number, chunk in enumerate(chunks):
            rows = chunk.rows_R
            made = layers.activations(chunk, q[rows], c[rows], v)
            k, _, x1, _, _, x2, _, _, w = made
            if number < num_kept:
                ctx.kept.append(made)
            out[rows] = torch.bmm(w[:, None], k)[:, 0]
            if number % stride == 0:
                real = chunk.real_RL.view(-1)
                for x, sums in ((x1, sums_1), (x2, sums_2)):
                    sums[0] += real @ x
                    sums[1] += real @ x.square()
                sampled += real.sum()
        ctx.save_for_backward(q, v, c)
        ctx.layers, ctx.chunks = layers, chunks
        ctx.mark_non_differentiable(sums_1, sums_2, sampled)
        return out, sums_1, sums_2, sampled

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, v, c = ctx.saved_tensors
        layers: _Layers = ctx.layers
        scale_1, scale_2 = layers.gates[0], layers.gates[2]
        dq, dv, dc = (torch.zeros_like(x) for x in (q, v, c))
        grads = [torch.zeros_like(parameter) for parameter in ctx.parameters]
        d_key, d_product, d_alpha_1, dw2, db2, d_alpha_2, dw3, db3 = grads
        for chunk in ctx.chunks:
            rows = chunk.rows_R
            q_RI, g_RI = q[rows], grad_out[rows]
            made = ctx.kept.pop(0) if ctx.kept else layers.activations(chunk, q_RI, c[rows], v)
            k, m, x1, p1, a1, x2, p2, a2, w = made
            dw = torch.bmm(k, g_RI[:, :, None]).view(w.shape).mul_(chunk.real_RL).view(-1)
            db3 += dw.sum()
            dw3[0] += dw @ a2
            # The gradient of a2 is dw (x) w3: never made, w3 goes into the channels' factors.
            slope, y2 = dice_slope(x2, p2, layers.alpha_2, scale_2, layers.w3_1H[0])
            d_alpha_2 += layers.w3_1H[0] * (dw @ y2)
            dx2 = slope.mul_(dw[:, None])
            db2 += dx2.sum(0)
            dw2.addmm_(dx2.T, a1)
            dx1, d_alpha = dice_grad(dx2 @ layers.w2_HC, x1, p1, layers.alpha_1, scale_1)
            d_alpha_1 += d_alpha
            dx1 = dx1.view(*w.shape, -1)
            dc[rows] = dx1.sum(1)
            dm = torch.bmm(dx1.transpose(1, 2), k)
            d_key += dm.sum(0)
            dq[rows] = (dm * layers.product_CI).sum(1)
            d_product += dm.mul_(q_RI[:, None]).sum(0)
            dk = torch.bmm(dx1, m).baddbmm_(w[:, :, None], g_RI[:, None])
            dv.index_add_(0, chunk.index_RL.view(-1), dk.view(-1, dk.shape[2]))
        return (dq, dv, dc, *grads, None, None)
