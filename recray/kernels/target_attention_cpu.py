"""DIN's target attention on a CPU: rows in chunks that stay in its cache, with a hand-written backward.

The plain form is `TargetAttention.plain` (recray.layers.target_attention), which computes all entries at once: for
4,096 rows of 50 entries and 64 channels each of its steps writes and reads 50 MB. Here

1.  rows are sorted by length and cut into chunks of about equal numbers of entries, each padded to its longest row.
    Rows of lengths 9, 8, 3, 1 and 0 with 16 entries per chunk make the chunks [9], [8, 3], [1]; the empty row has none.
2.  the first layer needs no product with q per entry: W k + Wp (q * k) = (W + Wp diag(q)) k, one small matrix per row.
3.  backward recomputes each chunk, except for the first ones, whose activations are kept while memory allows.

Shape legend: B rows, U distinct items, I item width, C and H channels of the two layers, R rows of a chunk, L entries
of its longest row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recray.kernels.dice import Curve
from recray.loading.jagged import Jagged

# Entries per chunk. What one thread works on fits into its cache; several threads share a larger chunk, or they would
# wait for each other too often. Without gradients the size does not depend on the number of threads, so that scores are
# bit-identical on any machine.
_ONE_THREAD, _PER_THREAD = 4_096, 8_192
_KEPT = 262_144  # entries whose activations are kept for backward: 200 MB with 64 and 32 channels
_SAMPLED = 49_152  # entries that Dice's averages are computed from, spread over all lengths


class Parameters(NamedTuple):
    """Weights of the attention's MLP, as in TargetAttention."""

    key_CI: Tensor
    product_CI: Tensor
    alpha_1: Tensor
    w2_HC: Tensor
    b2: Tensor
    alpha_2: Tensor
    w3_1H: Tensor
    b3: Tensor


class Gates(NamedTuple):
    """Scale and shift of the sigmoids in both Dices. They have no gradient."""

    scale_1: Tensor
    shift_1: Tensor
    scale_2: Tensor
    shift_2: Tensor


class Attended(NamedTuple):
    out_BI: Tensor  # weighted sums of each row's history; 0 for an empty one
    sums_1: Tensor  # (2, C) sums of x and of x^2 of the first Dice's input over the sampled entries
    sums_2: Tensor  # (2, H) the same of the second
    sampled: Tensor  # () number of sampled entries


def attend(q_BI: Tensor, v_UI: Tensor, c_BC: Tensor, history: Jagged, parameters: Parameters, gates: Gates) -> Attended:
    """c_BC: the part of the first layer that depends on q only. history: indices into v_UI. All on a CPU, in one dtype."""
    return Attended(*_Attend.apply(q_BI, v_UI, c_BC, history, gates, torch.is_grad_enabled(), *parameters))


@dataclass(frozen=True)
class _Chunk:
    rows: slice  # of the rows in order of their lengths
    index_RL: Tensor  # of items; any item where `real_RL` is 0
    real_RL: Tensor | None  # 1.0, or 0.0 for padding; None if all rows have the same length


def _chunks(history: Jagged, dtype: torch.dtype, learns: bool) -> tuple[Tensor, list[_Chunk]]:
    """The order of rows by length, longest first, and the chunks of those that have any entries."""
    lengths_B, order_B = history.lengths().sort(descending=True)
    starts_B = history.offsets[order_B]
    threads = torch.get_num_threads()
    entries = _PER_THREAD if not learns else _ONE_THREAD if threads == 1 else _PER_THREAD * threads
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
            index_RL.clamp_(max=len(history.values) - 1)  # padding after the last row
        out.append(_Chunk(slice(at, stop), history.values[index_RL], real_RL))
        at = stop
    return order_B, out


def _mask(x_RL: Tensor, chunk: _Chunk) -> Tensor:
    """Zero the padding in place."""
    return x_RL if chunk.real_RL is None else x_RL.mul_(chunk.real_RL)


_Make = Callable[..., Tensor]  # (name, *shape) -> a tensor to write to


class _Scratch:
    """Memory by name that every chunk reuses, so that it stays in the cache: fresh memory would be anywhere."""

    def __init__(self, like: Tensor) -> None:
        self._like, self._held = like, dict[str, Tensor]()

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self._held or len(self._held[name]) < size:
            self._held[name] = self._like.new_empty(size)
        return self._held[name][:size].view(shape)


class _Activations(NamedTuple):
    x1: Tensor  # (R L, C) input of the first Dice
    p1: Tensor  # its gate
    x2: Tensor  # (R L, H) input of the second Dice
    p2: Tensor
    w: Tensor  # (R, L) attention weights, 0 for padding


class _Layers:
    """The MLP on one chunk."""

    def __init__(self, parameters: Parameters, gates: Gates) -> None:
        self.parameters = parameters
        self.w3_H = parameters.w3_1H[0]
        self.dice_1 = Curve(gates.scale_1, gates.shift_1, parameters.alpha_1)
        # The gradient of the second Dice's output is the outer product of dw and w3. It is never computed: w3 is a
        # factor of the Dice's slope instead.
        self.dice_2 = Curve(gates.scale_2, gates.shift_2, parameters.alpha_2, self.w3_H)

    def inputs(self, chunk: _Chunk, q_RI: Tensor, v_UI: Tensor, scratch: _Make) -> tuple[Tensor, Tensor]:
        """k (R, L, I), and each row's matrix W + Wp diag(q) (R, C, I)."""
        (rows, length), width = chunk.index_RL.shape, v_UI.shape[1]
        key_CI, product_CI = self.parameters.key_CI, self.parameters.product_CI
        k = torch.index_select(v_UI, 0, chunk.index_RL.view(-1), out=scratch("k", rows * length, width))
        m = torch.addcmul(key_CI, q_RI[:, None], product_CI, out=scratch("m", rows, *key_CI.shape))
        return k.view(rows, length, width), m

    def activations(
        self, chunk: _Chunk, k: Tensor, m: Tensor, c_RC: Tensor, scratch: _Make, make: _Make
    ) -> _Activations:
        """Results are written to memory of `make`, intermediate values to `scratch`."""
        weights = self.parameters
        x1 = torch.baddbmm(c_RC[:, None], k, m.transpose(1, 2), out=make("x1", *k.shape[:2], m.shape[1]))
        x1 = x1.view(-1, m.shape[1])
        p1 = self.dice_1.gate(x1, make("p1", *x1.shape))
        a1 = self.dice_1.value(x1, p1, scratch("a1", *x1.shape))
        x2 = torch.addmm(weights.b2, a1, weights.w2_HC.T, out=make("x2", len(a1), len(weights.w2_HC)))
        p2 = self.dice_2.gate(x2, make("p2", *x2.shape))
        a2 = self.dice_2.value(x2, p2, scratch("a2", *x2.shape))
        w = _mask(torch.addmv(weights.b3, a2, self.w3_H).view(chunk.index_RL.shape), chunk)
        return _Activations(x1, p1, x2, p2, w)

    def backward(
        self, chunk: _Chunk, made: _Activations, k: Tensor, g_RI: Tensor, grads: Parameters, scratch: _Make
    ) -> Tensor:
        """dx1 (R, L, C), from the gradient of the chunk's output; adds to the gradients of the layers after x1."""
        x1, p1, x2, p2, w = made
        # With the single row as the first factor: the other way round takes six times as long.
        dw = _mask(torch.bmm(g_RI[:, None], k.transpose(1, 2))[:, 0], chunk).view(-1)
        grads.b3.add_(dw.sum())
        y2 = self.dice_2.alpha_slope(x2, p2, scratch("y2", *x2.shape))
        grads.w3_1H[0].addmv_(x2.T, dw)  # `finish` adds the rest of the Dice
        grads.alpha_2.addmv_(y2.T, dw)  # `finish` multiplies by w3
        dx2 = self.dice_2.slope(y2, p2, scratch("a2", *x2.shape)).mul_(dw[:, None])
        grads.b2.add_(dx2.sum(0))
        y1 = self.dice_1.alpha_slope(x1, p1, scratch("y1", *x1.shape))
        grads.w2_HC.addmm_(dx2.T, self.dice_1.value_from_slope(x1, y1, scratch("a1", *x1.shape)))
        da1 = torch.mm(dx2, self.parameters.w2_HC, out=scratch("da1", *x1.shape))
        dx1 = self.dice_1.slope(y1, p1, scratch("a1", *x1.shape)).mul_(da1).view(*w.shape, -1)
        grads.alpha_1.add_(y1.mul_(da1).sum(0))
        return dx1

    def finish(self, grads: Parameters) -> None:
        """After the last chunk: a2 = x2 - (1 - alpha) y2, so that dw3 = sum of dw x2 - (1 - alpha) sum of dw y2."""
        grads.w3_1H[0].sub_(self.dice_2.rest * grads.alpha_2)
        grads.alpha_2.mul_(self.w3_H)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, v: Tensor, c: Tensor, history: Jagged, gates: Gates, learns: bool, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        layers = _Layers(Parameters(*weights), gates)
        order, chunks = _chunks(history, q.dtype, learns)
        scratch = _Scratch(q)
        q, c, out = q[order], c[order], torch.zeros_like(q)
        sums_1, sums_2 = q.new_zeros(2, c.shape[1]), q.new_zeros(2, len(layers.w3_H))
        sampled = q.new_zeros(())
        kept: list[_Activations] = []
        to_keep = _KEPT if learns else 0
        stride = -(-len(history.values) // _SAMPLED)
        for number, chunk in enumerate(chunks):
            rows, keeps = chunk.rows, to_keep > 0
            to_keep -= chunk.index_RL.numel()
            make = (lambda _, *shape: q.new_empty(shape)) if keeps else scratch
            k, m = layers.inputs(chunk, q[rows], v, scratch)
            made = layers.activations(chunk, k, m, c[rows], scratch, make)
            if keeps:
                kept.append(made)
            torch.bmm(made.w[:, None], k, out=out[rows, None])
            # Chunks are in order of their rows' lengths: every n-th of them is a sample of all lengths.
            if number % stride == 0:
                real = (made.w.new_ones(made.w.shape) if chunk.real_RL is None else chunk.real_RL).view(-1)
                for x, sums in ((made.x1, sums_1), (made.x2, sums_2)):
                    sums[0].addmv_(x.T, real)
                    sums[1].addmv_(torch.mul(x, x, out=scratch("a1", *x.shape)).T, real)
                sampled += real.sum()
        ctx.save_for_backward(q, v, c, order)
        ctx.layers, ctx.chunks, ctx.kept = layers, chunks, kept
        ctx.mark_non_differentiable(sums_1, sums_2, sampled)
        return torch.empty_like(out).index_copy_(0, order, out), sums_1, sums_2, sampled

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        q, v, c, order = ctx.saved_tensors
        layers: _Layers = ctx.layers
        grad_out = grad_out[order]
        dq, dv, dc = (torch.zeros_like(x) for x in (q, v, c))
        grads = Parameters(*map(torch.zeros_like, layers.parameters))
        scratch = _Scratch(q)
        for chunk in ctx.chunks:
            rows = chunk.rows
            q_RI, g_RI = q[rows], grad_out[rows]
            k, m = layers.inputs(chunk, q_RI, v, scratch)
            made = ctx.kept.pop(0) if ctx.kept else layers.activations(chunk, k, m, c[rows], scratch, scratch)
            dx1 = layers.backward(chunk, made, k, g_RI, grads, scratch)
            # x1 = c + m k and out = sum of w k, so that k has two gradients.
            torch.sum(dx1, 1, out=dc[rows])
            dk = torch.bmm(dx1, m, out=scratch("dk", *k.shape)).baddbmm_(made.w[:, :, None], g_RI[:, None])
            dv.index_add_(0, chunk.index_RL.view(-1), dk.view(-1, dk.shape[2]))
            # m = W + Wp diag(q)
            dm = torch.bmm(dx1.transpose(1, 2), k, out=scratch("dm", *m.shape))
            grads.key_CI.add_(dm.sum(0))
            torch.sum(torch.mul(dm, layers.parameters.product_CI, out=m), 1, out=dq[rows])
            grads.product_CI.add_(dm.mul_(q_RI[:, None]).sum(0))
        layers.finish(grads)
        dq, dc = (torch.empty_like(x).index_copy_(0, order, x) for x in (dq, dc))
        return dq, dv, dc, None, None, None, *grads
