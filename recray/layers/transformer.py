"""A causal transformer block over rows of different lengths.

Layer norms and linear layers run on the T real tokens of the batch, without padding. Attention needs rows of one
length, so rows are sorted by length and padded in groups of similar lengths:

    lengths 1 2 2 6 7 7 8 8, 4 groups     [1 2] [2 6] [7 7] [8 8]     46 places for 41 tokens; one group has 64

Shape legend: T tokens, R rows of a group, L length of its longest row, H heads, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recray.kernels.dropout import dropout

_GROUPS = 4  # per batch. More waste less padding but start more small operations.
_FEW = (
    1 << 24
)  # padded numbers below which one group is faster on a GPU: starting the operations takes longer than they do


class RowGroup:
    """Rows of similar lengths, whose tokens are consecutive in the batch."""

    def __init__(self, lengths: list[int], lengths_R: Tensor) -> None:
        """The lengths twice, ascending and above 0: on the host, so that no GPU is waited for, and on the device."""
        self.rows, self.length, self.tokens = len(lengths), lengths[-1], sum(lengths)
        self.padded = self.tokens < self.rows * self.length
        self.real_RL: Tensor | None = None  # bool; None if all rows have the same length
        if self.padded:
            self.real_RL = torch.arange(self.length, device=lengths_R.device) < lengths_R[:, None]
            # Token t of the group is at place t + gap of its row in a (R L, D) tensor.
            starts_R = lengths_R.cumsum(0) - lengths_R
            gap_R = torch.arange(self.rows, device=lengths_R.device) * self.length - starts_R
            self.place_T = torch.repeat_interleave(gap_R, lengths_R, output_size=self.tokens)
            self.place_T += torch.arange(self.tokens, device=lengths_R.device)

    @staticmethod
    def masked(real_RL: Tensor) -> RowGroup:
        """Rows that are padded already: a token for every place of a row, `real_RL` says which are real. For torch.export."""
        group = RowGroup.__new__(RowGroup)
        group.rows, group.length = real_RL.shape
        group.tokens, group.padded = group.rows * group.length, False
        # A row without any real token attends its first place: a softmax over nothing is NaN.
        group.real_RL = real_RL | (torch.arange(group.length, device=real_RL.device) == 0)
        return group

    def pad(self, x_TD: Tensor) -> Tensor:
        """(R, L, D): rows start at the left, so that a causal mask alone hides the padding from real tokens."""
        if self.padded:
            x_TD = x_TD.new_zeros(self.rows * self.length, x_TD.shape[1]).index_copy_(0, self.place_T, x_TD)
        return x_TD.view(self.rows, self.length, -1)

    def unpad(self, x_RLD: Tensor) -> Tensor:
        """(T, D)"""
        x_TD = x_RLD.reshape(self.rows * self.length, -1)
        return x_TD.index_select(0, self.place_T) if self.padded else x_TD


def group_rows(lengths: list[int], lengths_R: Tensor, dim: int) -> list[RowGroup]:
    """Groups of about equal numbers of rows. lengths: as for RowGroup. dim: width of a token."""
    if not lengths:
        return []
    few = lengths_R.is_cuda and len(lengths) * lengths[-1] * dim <= _FEW
    size = len(lengths) if few else -(-len(lengths) // _GROUPS)
    return [RowGroup(lengths[at : at + size], lengths_R[at : at + size]) for at in range(0, len(lengths), size)]


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), causal.

    feed_forward: gelu(x W1) W2, or if gated (silu(x W1) * x W3) W2 (SwiGLU), with inner width expansion * D.
    """

    def __init__(self, dim: int, heads: int, expansion: int, dropout: float, gated: bool) -> None:
        super().__init__()
        inner = dim * expansion
        self.heads, self.dropout, self.gated = heads, dropout, gated
        self.attention_norm, self.feed_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.up = nn.Linear(dim, 2 * inner if gated else inner)  # W1, and W3
        self.down = nn.Linear(inner, dim)

    def forward(self, x_TD: Tensor, groups: list[RowGroup]) -> Tensor:
        """(T, D)"""
        y_TD = self._attend(self.qkv(self.attention_norm(x_TD)), groups)
        return self._feed(x_TD + self._drop(self.out(y_TD)))

    def last(self, x_TD: Tensor, groups: list[RowGroup], last_R: Tensor) -> Tensor:
        """(R, D): what `forward` gives for the tokens `last_R` that end their rows. Of other tokens only keys and values
        are computed."""
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
        return self._feed(x_TD[last_R] + self._drop(self.out(torch.cat(parts))))

    def _feed(self, x_TD: Tensor) -> Tensor:
        inner = self.up(self.feed_norm(x_TD))
        if self.gated:
            gate, value = inner.chunk(2, dim=-1)
            inner = F.silu(gate) * value
        else:
            inner = F.gelu(inner)
        return x_TD + self._drop(self.down(self._drop(inner)))

    def _attend(self, qkv: Tensor, groups: list[RowGroup]) -> Tensor:
        parts = []
        for group, part in zip(groups, torch.split(qkv, [group.tokens for group in groups]), strict=True):
            q, k, v = map(self._heads, group.pad(part).chunk(3, 2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            parts.append(group.unpad(y.transpose(1, 2).flatten(2)))
        # Without any token still a function of every weight: DDP waits for the gradient of every parameter.
        return torch.cat(parts) if parts else qkv[:, : qkv.shape[1] // 3]

    def _heads(self, x_RLD: Tensor) -> Tensor:
        """(R, H, L, D / H)"""
        return torch.unflatten(x_RLD, 2, (self.heads, -1)).transpose(1, 2)

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training)
