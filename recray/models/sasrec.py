"""SASRec: a causal transformer over a user's history (Kang & McAuley, ICDM 2018).

    x_t = sqrt(D) item_table[item_t] + position[t]     x = blocks(x)     q = norm(x at the query's position)
    score of an item = q . item_table[item]            positions are counted from the end of the history

Pre-norm blocks; `feed_forward = "gated"` is a SwiGLU feed-forward (Shazeer 2020), without the gates that LiGR has on its
residual branches (eSASRec, arXiv 2508.06450). In training every position of a history is a query for the item after it;
otherwise there is one query after the last event.

Shape legend: B rows, T tokens (events of all histories), Q queries, N items, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recray.config.models import SasrecOptions as Options
from recray.kernels.dropout import dropout
from recray.layers.embedding import Table
from recray.layers.transformer import RowGroup, TransformerBlock, group_rows
from recray.loading.batch import Batch, ItemTable, Jagged
from recray.loading.jagged import Padded
from recray.models import Examples, Retriever
from recray.records import DatasetRecord


class SASRec(Retriever):
    examples: Examples = "sequences"

    def __init__(self, options: Options, dataset: DatasetRecord, items: ItemTable) -> None:
        super().__init__()
        if options.dim % options.heads:
            raise ValueError(f"model.dim = {options.dim} is not a multiple of model.heads = {options.heads}")
        self.options = options
        self.item_table = Table(dataset.num_items, options.dim, std=0.02, ids="item")
        self.position = nn.Parameter(torch.randn(options.history_length, options.dim) * 0.02)
        gated = options.feed_forward == "gated"
        self.blocks = nn.ModuleList(
            TransformerBlock(options.dim, options.heads, options.expansion, options.dropout, gated)
            for _ in range(options.layers)
        )
        self.norm = nn.LayerNorm(options.dim)

    def query_vectors(self, batch: Batch) -> Tensor:
        if isinstance(batch.history, Padded):
            return self._padded_query_vectors(batch.history)
        # Rows in order of their lengths, so that a group of rows of similar lengths is a slice of the tokens.
        lengths_B, order_B = batch.history.lengths().sort()
        lengths, tokens = lengths_B.tolist(), len(batch.history.values)  # the only place that waits for a GPU
        empty = lengths.count(0)
        history = batch.history.take(order_B, tokens)
        groups = group_rows(lengths[empty:], lengths_B[empty:], self.options.dim)
        x_TD = self._embed(history, lengths_B)
        *earlier, final = self.blocks
        for block in earlier:
            x_TD = block(x_TD, groups)
        if batch.position_Q is None:
            assert isinstance(final, TransformerBlock)
            # Zeros for users without a history. A learned vector would have no gradient in training, where all have one.
            x_BD = x_TD.new_zeros(len(lengths), self.options.dim)
            x_BD[order_B[empty:]] = final.last(x_TD, groups, history.offsets[1 + empty :] - 1)
            return self._normalize(self.norm(x_BD))
        x_TD = final(x_TD, groups)
        # position_Q points into the batch's order of rows; a row's tokens moved from its old offset to its new one.
        offset_B = torch.empty_like(lengths_B).index_copy_(0, order_B, history.offsets[:-1])
        row_Q = torch.bucketize(batch.position_Q, batch.history.offsets[1:], right=True)
        token_Q = batch.position_Q + (offset_B - batch.history.offsets[:-1])[row_Q]
        return self._normalize(self.norm(x_TD.index_select(0, token_Q)))

    def _padded_query_vectors(self, history: Padded) -> Tensor:
        """(B, D): one query after each row's last event. All rows are one group, whose padding is masked."""
        rows, length = history.real_BL.shape
        lengths_B = history.lengths()
        from_end_T = (lengths_B[:, None] - 1 - torch.arange(length, device=lengths_B.device)).clamp(min=0).view(-1)
        x_TD = self.item_table(history.values) * self.options.dim**0.5 + F.embedding(from_end_T, self.position)
        groups = [RowGroup.masked(history.real_BL)]
        *earlier, final = self.blocks
        for block in earlier:
            x_TD = block(x_TD, groups)
        assert isinstance(final, TransformerBlock)
        last_B = torch.arange(rows, device=lengths_B.device) * length + (lengths_B - 1).clamp(min=0)
        x_BD = torch.where(lengths_B[:, None] > 0, final.last(x_TD, groups, last_B), 0.0)
        return self._normalize(self.norm(x_BD))

    def item_vectors(self, item_ids: Tensor) -> Tensor:
        return self._normalize(self.item_table(item_ids))

    def _embed(self, history: Jagged, lengths_B: Tensor) -> Tensor:
        """(T, D). Position 0 is the most recent event, as with the paper's padding at the left."""
        tokens = len(history.values)
        from_end_T = torch.repeat_interleave(history.offsets[1:], lengths_B, output_size=tokens) - 1
        from_end_T -= torch.arange(tokens, device=from_end_T.device)
        # Vectors are small at first (std 0.02): scaled by sqrt(D), items outweigh positions.
        x_TD = self.item_table(history.values) * self.options.dim**0.5 + F.embedding(from_end_T, self.position)
        return dropout(x_TD, self.options.dropout, self.training)

    def _normalize(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.options.normalize else x


build = SASRec
