"""SASRec: a causal transformer over a user's history (Kang & McAuley, ICDM 2018).

Pre-norm blocks; `feed_forward = "gated"` is the SwiGLU block of LiGR and eSASRec
(arXiv 2508.06450). Everything but attention runs on the T real tokens of the batch,
without padding; attention runs on rows of like length together, so that little
padding is computed there either.

Shape legend: B rows, T tokens, L longest row of a group, H heads, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from recray.config import ModelOptions
from recray.models import Examples
from recray.models.batch import Batch, ItemTable
from recray.models.embedding import Table
from recray.models.parts import dropout
from recray.records import DatasetRecord

_GROUPS = 4  # groups of rows by length: more waste less padding but start more small kernels


class Options(ModelOptions):
    name: str = "sasrec"
    history_length: int = Field(200, ge=1)
    layers: int = Field(2, ge=1)
    heads: int = Field(1, ge=1)
    dropout: float = Field(0.2, ge=0, lt=1)
    feed_forward: Literal["mlp", "gated"] = "mlp"
    expansion: int = Field(4, ge=1, description="width of the feed-forward part, in units of dim")
    normalize: bool = Field(
        False, description="vectors of length 1: scores are cosines (set loss.temperature to 0.05 to 0.2)"
    )


class _Layout:
    """How T tokens are cut into groups of rows of like length."""

    def __init__(self, lengths_B: Tensor, offsets: Tensor) -> None:
        order = torch.argsort(lengths_B)
        order = order[lengths_B[order] > 0]
        self.groups: list[tuple[Tensor, Tensor]] = []
        for rows in order.chunk(_GROUPS) if len(order) else ():
            length = int(lengths_B[rows[-1]])
            step_L = torch.arange(length, device=offsets.device)
            # Rows start at the left, so that "causal" alone keeps real tokens from the padding behind them.
            real = step_L[None] < lengths_B[rows][:, None]
            index = torch.where(real, offsets[rows][:, None] + step_L[None], 0)
            self.groups.append((index, real))


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

    def forward(self, x_TD: Tensor, layout: _Layout) -> Tensor:
        x_TD = x_TD + dropout(
            self.out(self._attend(self.qkv(self.attention_norm(x_TD)), layout)), self.dropout, self.training
        )
        inner = self.up(self.feed_norm(x_TD))
        if self.gated:
            gate, value = inner.chunk(2, dim=-1)
            inner = F.silu(gate) * value
        else:
            inner = F.gelu(inner)
        return x_TD + dropout(self.down(dropout(inner, self.dropout, self.training)), self.dropout, self.training)

    def _attend(self, qkv: Tensor, layout: _Layout) -> Tensor:
        dim = qkv.shape[1] // 3
        parts, places = [], []
        for index, real in layout.groups:
            rows, length = index.shape
            q, k, v = qkv[index.reshape(-1)].view(rows, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            parts.append(y.transpose(1, 2).reshape(rows, length, dim)[real])
            places.append(index[real])
        out = torch.zeros(len(qkv), dim, dtype=qkv.dtype, device=qkv.device)
        return out.index_copy(0, torch.cat(places), torch.cat(parts)) if parts else out


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
        history, lengths_B = batch.history, batch.history.lengths()
        num_tokens = len(history.values)
        row_T = torch.repeat_interleave(torch.arange(len(lengths_B), device=lengths_B.device), lengths_B)
        from_end_T = history.offsets[1:][row_T] - 1 - torch.arange(num_tokens, device=lengths_B.device)
        x_TD = self.item_table(history.values) * self.options.dim**0.5 + self.position[from_end_T]
        x_TD = dropout(x_TD, self.options.dropout, self.training)
        layout = _Layout(lengths_B, history.offsets[:-1])
        for block in self.blocks:
            x_TD = block(x_TD, layout)
        if batch.position_Q is not None:
            q_QD = self.norm(x_TD[batch.position_Q])
        else:
            # One more row, of zeros, for users without a history. No parameter: it would have no gradient in training.
            ends_B = torch.where(lengths_B > 0, history.offsets[1:] - 1, num_tokens)
            q_QD = self.norm(torch.cat([x_TD, x_TD.new_zeros(1, self.options.dim)])[ends_B])
        return F.normalize(q_QD, dim=-1) if self.options.normalize else q_QD

    def item_vectors(self, item_ids: Tensor) -> Tensor:
        v_ND: Tensor = self.item_table(item_ids)
        return F.normalize(v_ND, dim=-1) if self.options.normalize else v_ND


def build(options: Options, dataset: DatasetRecord, items: ItemTable) -> SASRec:
    return SASRec(options, dataset)
