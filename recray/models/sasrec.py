"""SASRec: a causal transformer over a user's history (Kang & McAuley, ICDM 2018).

Pre-norm blocks; `feed_forward = "gated"` is the SwiGLU block of LiGR and eSASRec
(arXiv 2508.06450). Everything but attention runs on the T real tokens of the batch,
without padding; attention runs on rows of like length together, so that little
padding is computed there either.

Shape legend: B rows, T tokens, L longest row of a group, H heads, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recray.config.models import SasrecOptions as Options
from recray.layers.embedding import Table
from recray.layers.feature_encoder import dropout, select
from recray.loading.batch import Batch, ItemTable, Jagged
from recray.models import Examples
from recray.records import DatasetRecord

# Groups of rows by length: more waste less padding but start more small operations, four twice as many in a step as one.
_GROUPS = 4
_FEW = 1 << 24  # numbers, with padding: so few are less work for a GPU than starting the operations is for its host


class _Group:
    """Rows of like length, whose tokens follow one another; padded to the longest where they are not of one length."""

    def __init__(self, lengths: list[int], lengths_R: Tensor) -> None:
        """Ascending, and the same on the device, which is not waited for."""
        self.rows, self.length, self.tokens = len(lengths), lengths[-1], sum(lengths)
        self.padded = self.tokens < self.rows * self.length
        self.real_RL: Tensor | None = None  # bool; None where all are
        if self.padded:
            step_L = torch.arange(self.length, device=lengths_R.device)
            # Rows start at the left, so that "causal" alone keeps real tokens from the padding behind them.
            self.real_RL = real_RL = step_L < lengths_R[:, None]
            starts_R = lengths_R.cumsum(0) - lengths_R
            self.token_RL = torch.where(real_RL, starts_R[:, None] + step_L, 0).flatten()  # any token for padding
            gap_R = torch.arange(self.rows, device=lengths_R.device) * self.length - starts_R
            self.place_T = torch.repeat_interleave(gap_R, lengths_R, output_size=self.tokens)
            self.place_T += torch.arange(self.tokens, device=lengths_R.device)

    def pad(self, x_TD: Tensor) -> Tensor:
        """(R, L, D)"""
        if self.padded:
            x_TD = _Pad.apply(x_TD, self.token_RL, self.place_T)  # type: ignore[no-untyped-call]
        return x_TD.view(self.rows, self.length, -1)

    def unpad(self, x_RLD: Tensor) -> Tensor:
        """(T, D)"""
        x_TD = x_RLD.reshape(self.rows * self.length, -1)
        return _Unpad.apply(x_TD, self.token_RL, self.place_T) if self.padded else x_TD  # type: ignore[no-untyped-call, no-any-return]


def _groups(lengths: list[int], lengths_R: Tensor, dim: int) -> list[_Group]:
    if not lengths:
        return []
    few = lengths_R.is_cuda and len(lengths) * lengths[-1] * dim <= _FEW
    size = len(lengths) if few else -(-len(lengths) // _GROUPS)
    starts = range(0, len(lengths), size)
    return [_Group(lengths[at : at + size], lengths_R[at : at + size]) for at in starts]


class _Pad(torch.autograd.Function):
    """Each token has one place, so that its gradient is read from there: nothing is added up."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_P: Tensor, place_T: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(place_T)
        return x_TD.index_select(0, token_P)

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad_PD.index_select(0, ctx.saved_tensors[0]), None, None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, token_P: Tensor, place_T: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(place_T)
        ctx.places = len(token_P)
        return x_PD.index_select(0, place_T)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        grad_PD = grad_TD.new_zeros(ctx.places, grad_TD.shape[1])
        return grad_PD.index_copy_(0, ctx.saved_tensors[0], grad_TD), None, None


class _Block(nn.Module):
    def __init__(self, options: Options) -> None:
        super().__init__()
        dim, inner = options.dim, options.dim * options.expansion
        self.heads, self.dropout, self.gated = options.heads, options.dropout, options.feed_forward == "gated"
        self.attention_norm, self.feed_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.up = nn.Linear(dim, 2 * inner if self.gated else inner)
        self.down = nn.Linear(inner, dim)

    def forward(self, x_TD: Tensor, groups: list[_Group]) -> Tensor:
        y_TD = self._attend(self.qkv(self.attention_norm(x_TD)), groups)
        return self._feed(x_TD + dropout(self.out(y_TD), self.dropout, self.training))

    def last(self, x_TD: Tensor, groups: list[_Group], last_R: Tensor) -> Tensor:
        """(R, D): `forward` of each row's last token, `last_R`; of the others only keys and values are needed."""
        dim = x_TD.shape[1]
        normed_TD = self.attention_norm(x_TD)
        q_RD = F.linear(normed_TD[last_R], self.qkv.weight[:dim], self.qkv.bias[:dim])
        kv = F.linear(normed_TD, self.qkv.weight[dim:], self.qkv.bias[dim:])
        parts = [q_RD[:0]]
        rows, tokens = [group.rows for group in groups], [group.tokens for group in groups]
        for group, q_part, kv_part in zip(groups, torch.split(q_RD, rows), torch.split(kv, tokens), strict=True):
            q, k, v = map(self._heads, (q_part[:, None], *group.pad(kv_part).chunk(2, 2)))
            real = None if group.real_RL is None else group.real_RL[:, None, None]
            parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=real).flatten(1))
        return self._feed(x_TD[last_R] + dropout(self.out(torch.cat(parts)), self.dropout, self.training))

    def _feed(self, x_TD: Tensor) -> Tensor:
        inner = self.up(self.feed_norm(x_TD))
        if self.gated:
            gate, value = inner.chunk(2, dim=-1)
            inner = F.silu(gate) * value
        else:
            inner = F.gelu(inner)
        return x_TD + dropout(self.down(dropout(inner, self.dropout, self.training)), self.dropout, self.training)

    def _attend(self, qkv: Tensor, groups: list[_Group]) -> Tensor:
        parts = []
        for group, part in zip(groups, torch.split(qkv, [group.tokens for group in groups]), strict=True):
            q, k, v = map(self._heads, group.pad(part).chunk(3, 2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            parts.append(group.unpad(y.transpose(1, 2).flatten(2)))
        # Without any token still a function of every weight: DDP waits for all gradients.
        return torch.cat(parts) if parts else qkv[:, : qkv.shape[1] // 3]

    def _heads(self, x_RLD: Tensor) -> Tensor:
        """(R, H, L, D / H)"""
        return torch.unflatten(x_RLD, 2, (self.heads, -1)).transpose(1, 2)


class SASRec(nn.Module):
    examples: Examples = "sequences"

    def __init__(self, options: Options, dataset: DatasetRecord) -> None:
        super().__init__()
        if options.dim % options.heads:
            raise ValueError(f"model.dim = {options.dim} does not divide by model.heads = {options.heads}")
        self.options = options
        self.item_table = Table(dataset.num_items, options.dim, std=0.02, ids="item")
        # Counted from the end: the most recent event always has position 0, as with SASRec's left padding.
        self.position = nn.Parameter(torch.randn(options.history_length, options.dim) * 0.02)
        self.blocks = nn.ModuleList(_Block(options) for _ in range(options.layers))
        self.norm = nn.LayerNorm(options.dim)

    def query_vectors(self, batch: Batch) -> Tensor:
        lengths_B, order_B = batch.history.lengths().sort()
        lengths, tokens = lengths_B.tolist(), len(batch.history.values)  # the only place where a GPU is waited for
        empty = lengths.count(0)
        # Tokens in order of their rows' lengths, so that a group of rows is a slice of them.
        history = select(batch.history, order_B, tokens)
        assert isinstance(history, Jagged)
        from_end_T = torch.repeat_interleave(history.offsets[1:], lengths_B, output_size=tokens) - 1
        from_end_T -= torch.arange(tokens, device=from_end_T.device)
        x_TD = self.item_table(history.values) * self.options.dim**0.5 + F.embedding(from_end_T, self.position)
        x_TD = dropout(x_TD, self.options.dropout, self.training)
        groups = _groups(lengths[empty:], lengths_B[empty:], self.options.dim)
        *earlier, final = self.blocks
        for block in earlier:
            x_TD = block(x_TD, groups)
        if batch.position_Q is None:
            assert isinstance(final, _Block)
            # Users without a history have zeros. No parameter: it would have no gradient in training.
            x_BD = x_TD.new_zeros(len(lengths), self.options.dim)
            x_BD[order_B[empty:]] = final.last(x_TD, groups, history.offsets[1 + empty :] - 1)
            return self._query(x_BD)
        x_TD = final(x_TD, groups)
        offset_B = torch.empty_like(lengths_B).index_copy_(0, order_B, history.offsets[:-1])
        row_Q = torch.bucketize(batch.position_Q, batch.history.offsets[1:], right=True)
        token_Q = batch.position_Q + (offset_B - batch.history.offsets[:-1])[row_Q]
        return self._query(x_TD.index_select(0, token_Q))

    def _query(self, x_QD: Tensor) -> Tensor:
        q_QD: Tensor = self.norm(x_QD)
        return F.normalize(q_QD, dim=-1) if self.options.normalize else q_QD

    def item_vectors(self, item_ids: Tensor) -> Tensor:
        v_ND: Tensor = self.item_table(item_ids)
        return F.normalize(v_ND, dim=-1) if self.options.normalize else v_ND


def build(options: Options, dataset: DatasetRecord, items: ItemTable) -> SASRec:
    return SASRec(options, dataset)
