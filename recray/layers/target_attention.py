"""DIN's attention over jagged histories: a small MLP on (candidate, history item) for every entry.

The first layer over [q, k, q - k, q * k] is linear in k once q is given, so each row has one matrix of its own:

    W [q, k, q - k, q * k] + b  =  c + M' k,     c = (Wq + Wd) q + b     M' = (Wk - Wd) + Wp diag(q)

which is the same function for a quarter of the products. On a CPU rows go through in
chunks of about equal lengths that stay in its cache. Of the first chunks what is dear
to make again is kept for backward; memory stays bounded.

Shape legend: B rows, U distinct items, I item width, C and H channels of the two
layers, R rows of a chunk, L entries of its longest row, T entries of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recray.layers.dice import Curve, Dice
from recray.loading.batch import Jagged

# Entries of a chunk by the threads that share it. What one thread works on fits its cache; several would wait for each
# other too often. Where nothing is learned all threads share one size: scores are then the same to the last bit.
_ALONE, _SHARED = 4_096, 8_192
_KEPT = 262_144  # entries whose activations wait for backward, 200 MB with 64 and 32 channels
_SAMPLED = 49_152  # entries that Dice learns its averages from, spread over all lengths


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
            *(history, (*self.dice_1.gate(), *self.dice_2.gate()), torch.is_grad_enabled()),
        )
        if self.training:
            self.dice_1.see(sums_1, sampled)
            self.dice_2.see(sums_2, sampled)
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
    """Rows of similar lengths, padded to the longest. Rows are in order of their lengths."""

    rows: slice
    index_RL: Tensor  # of items; any item where `real_RL` is 0
    real_RL: Tensor | None  # float, 1 or 0; None where all rows have the same length


def _chunks(history: Jagged, dtype: torch.dtype, learns: bool) -> tuple[Tensor, list[_Chunk]]:
    """The order of rows by lengths, longest first, and the chunks of those that have any entries."""
    lengths_B, order_B = history.lengths().sort(descending=True)
    starts_B = history.offsets[order_B]
    threads = torch.get_num_threads()
    entries = _SHARED if not learns else _ALONE if threads == 1 else _SHARED * threads
    longest = lengths_B.tolist()
    num_rows = int(lengths_B.count_nonzero())
    out, at = [], 0
    while at < num_rows:
        length = longest[at]
        stop = min(num_rows, at + max(1, entries // length))
        place_L, starts_R1, real_RL = torch.arange(length), starts_B[at:stop, None], None
        index_RL = starts_R1 + place_L
        if longest[stop - 1] < length:
            real_RL = (place_L < lengths_B[at:stop, None]).to(dtype)
            index_RL.clamp_(max=len(history.values) - 1)
        out.append(_Chunk(slice(at, stop), history.values[index_RL], real_RL))
        at = stop
    return order_B, out


_Make = Callable[..., Tensor]  # name and shape to a tensor to compute in


class _Scratch:
    """Tensors by name that chunk after chunk is computed in, so that they stay in the cache: fresh ones would be anywhere."""

    def __init__(self, like: Tensor) -> None:
        self._like, self._held = like, dict[str, Tensor]()

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self._held or len(self._held[name]) < size:
            self._held[name] = self._like.new_empty(size)
        return self._held[name][:size].view(shape)


class _Layers:
    """Both layers with their Dices, and the last weights."""

    def __init__(self, gates: tuple[Tensor, ...], parameters: Sequence[Tensor]) -> None:
        self.key_CI, self.product_CI, alpha_1, self.w2_HC, self.b2, alpha_2, w3_1H, self.b3 = parameters
        self.w3_H = w3_1H[0]
        self.dice_1 = Curve(gates[0], gates[1], alpha_1)
        # The gradient of the second layer's outputs is that of the weights (x) w3: never made, w3 goes into the slope.
        self.dice_2 = Curve(gates[2], gates[3], alpha_2, self.w3_H)

    def inputs(self, chunk: _Chunk, q_RI: Tensor, v_UI: Tensor, scratch: _Make) -> tuple[Tensor, Tensor]:
        """k (R, L, I) and M' (R, C, I)."""
        (rows, length), width = chunk.index_RL.shape, v_UI.shape[1]
        k = torch.index_select(v_UI, 0, chunk.index_RL.view(-1), out=scratch("k", rows * length, width))
        m = torch.addcmul(self.key_CI, q_RI[:, None], self.product_CI, out=scratch("m", rows, *self.key_CI.shape))
        return k.view(rows, length, width), m

    def activations(
        self, chunk: _Chunk, k: Tensor, m: Tensor, c_RC: Tensor, scratch: _Make, make: _Make
    ) -> tuple[Tensor, ...]:
        """x1, p1 (R L, C), x2, p2 (R L, H): inputs of both layers, and p of their Dices; and the weights (R, L)."""
        x1 = torch.baddbmm(c_RC[:, None], k, m.transpose(1, 2), out=make("x1", *k.shape[:2], m.shape[1]))
        x1 = x1.view(-1, m.shape[1])
        p1 = self.dice_1.gate(x1, make("p1", *x1.shape))
        a1 = self.dice_1.value(x1, p1, scratch("a1", *x1.shape))
        x2 = torch.addmm(self.b2, a1, self.w2_HC.T, out=make("x2", len(a1), len(self.w2_HC)))
        p2 = self.dice_2.gate(x2, make("p2", *x2.shape))
        a2 = self.dice_2.value(x2, p2, scratch("a2", *x2.shape))
        w = _masked(torch.addmv(self.b3, a2, self.w3_H).view(chunk.index_RL.shape), chunk)
        return x1, p1, x2, p2, w


def _masked(x_RL: Tensor, chunk: _Chunk) -> Tensor:
    """0 where a row has no entry, in place."""
    return x_RL if chunk.real_RL is None else x_RL.mul_(chunk.real_RL)


class _Chunked(torch.autograd.Function):
    """(B, I) weighted sums; and for Dice sums and sums of squares of both layers' inputs over so many sampled entries."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, v: Tensor, c: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *parameters, history, gates, learns = rest
        layers = _Layers(gates, parameters)
        ctx.parameters = parameters
        order, chunks = _chunks(history, q.dtype, learns)
        scratch = _Scratch(q)
        q, c, out = q[order], c[order], torch.zeros_like(q)
        sums_1, sums_2 = q.new_zeros(2, len(layers.key_CI)), q.new_zeros(2, len(layers.w2_HC))
        sampled = q.new_zeros(())
        ctx.kept = []
        to_keep = _KEPT if learns else 0
        stride = -(-len(history.values) // _SAMPLED)
        for number, chunk in enumerate(chunks):
            rows = chunk.rows
            keeps = to_keep > 0
            to_keep -= chunk.index_RL.numel()
            make = (lambda _, *shape: q.new_empty(shape)) if keeps else scratch
            k, m = layers.inputs(chunk, q[rows], v, scratch)
            made = layers.activations(chunk, k, m, c[rows], scratch, make)
            x1, _, x2, _, w = made
            if keeps:
                ctx.kept.append(made)
            torch.bmm(w[:, None], k, out=out[rows, None])
            if number % stride == 0:
                real = (w.new_ones(w.shape) if chunk.real_RL is None else chunk.real_RL).view(-1)
                for x, sums in ((x1, sums_1), (x2, sums_2)):
                    sums[0].addmv_(x.T, real)
                    sums[1].addmv_(torch.mul(x, x, out=scratch("a1", *x.shape)).T, real)
                sampled += real.sum()
        ctx.save_for_backward(q, v, c, order)
        ctx.layers, ctx.chunks = layers, chunks
        ctx.mark_non_differentiable(sums_1, sums_2, sampled)
        return torch.empty_like(out).index_copy_(0, order, out), sums_1, sums_2, sampled

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, v, c, order = ctx.saved_tensors
        layers: _Layers = ctx.layers
        grad_out = grad_out[order]
        dq, dv, dc = (torch.zeros_like(x) for x in (q, v, c))
        grads = [torch.zeros_like(parameter) for parameter in ctx.parameters]
        d_key, d_product, d_alpha_1, dw2, db2, d_alpha_2, dw3, db3 = grads
        dw_x2, dw_y2 = torch.zeros_like(layers.w3_H), torch.zeros_like(layers.w3_H)
        scratch = _Scratch(q)
        for chunk in ctx.chunks:
            rows = chunk.rows
            q_RI, g_RI = q[rows], grad_out[rows]
            k, m = layers.inputs(chunk, q_RI, v, scratch)
            made = ctx.kept.pop(0) if ctx.kept else layers.activations(chunk, k, m, c[rows], scratch, scratch)
            x1, p1, x2, p2, w = made
            # With the one row first: the other way round takes six times as long.
            dw = _masked(torch.bmm(g_RI[:, None], k.transpose(1, 2))[:, 0], chunk).view(-1)
            db3 += dw.sum()
            y2 = layers.dice_2.closed(x2, p2, scratch("y2", *x2.shape))
            dw_x2.addmv_(x2.T, dw)
            dw_y2.addmv_(y2.T, dw)
            dx2 = layers.dice_2.slope(y2, p2, scratch("a2", *x2.shape)).mul_(dw[:, None])
            db2 += dx2.sum(0)
            y1 = layers.dice_1.closed(x1, p1, scratch("y1", *x1.shape))
            dw2.addmm_(dx2.T, layers.dice_1.value_of(x1, y1, scratch("a1", *x1.shape)))
            da1 = torch.mm(dx2, layers.w2_HC, out=scratch("da1", *x1.shape))
            dx1 = layers.dice_1.slope(y1, p1, scratch("a1", *x1.shape)).mul_(da1).view(*w.shape, -1)
            d_alpha_1 += y1.mul_(da1).sum(0)
            torch.sum(dx1, 1, out=dc[rows])
            dk = torch.bmm(dx1, m, out=scratch("dk", *k.shape)).baddbmm_(w[:, :, None], g_RI[:, None])
            dv.index_add_(0, chunk.index_RL.view(-1), dk.view(-1, dk.shape[2]))
            dm = torch.bmm(dx1.transpose(1, 2), k, out=scratch("dm", *m.shape))
            d_key += dm.sum(0)
            torch.sum(torch.mul(dm, layers.product_CI, out=m), 1, out=dq[rows])
            d_product += dm.mul_(q_RI[:, None]).sum(0)
        d_alpha_2 += layers.w3_H * dw_y2
        dw3[0] += dw_x2 - layers.dice_2.rest * dw_y2  # a2 = x2 - (1 - alpha) y2
        dq, dc = (torch.empty_like(x).index_copy_(0, order, x) for x in (dq, dc))
        return (dq, dv, dc, *grads, None, None, None)
