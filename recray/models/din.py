"""Deep Interest Network: attention of the candidate over the user's history (Zhou et al., KDD 2018).

    weight of a history item k for candidate q:  a(q, k) = MLP([q, k, q - k, q * k])
    interest = norm(sum over the history of a(q, k) k)     logit = MLP([user, context, q, interest, q * interest])

Vectors of items and interests are layer-normalised; without it training took many times the epochs. Rows whose history
is shorter than `min_history` take the mean of the history instead of attention.

Shape legend: B rows, C candidates of a row, T history entries of all rows together, U distinct items, I item width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from recray.config.models import DinOptions as Options
from recray.layers.dice import Dice
from recray.layers.feature_encoder import Dropout, mean_pool
from recray.layers.ranker_inputs import RankerInputs
from recray.layers.target_attention import TargetAttention
from recray.loading.batch import Batch, ItemTable, Jagged
from recray.loading.jagged import Padded
from recray.models import Ranker
from recray.records import DatasetRecord


class Din(Ranker):
    def __init__(self, options: Options, dataset: DatasetRecord, items: ItemTable) -> None:
        super().__init__()
        self.min_history = options.min_history
        self.inputs = RankerInputs(options, dataset, items)
        width = self.inputs.item.width
        self.item_norm, self.interest_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.row_norm = nn.LayerNorm(self.inputs.row_width) if self.inputs.row_width else nn.Identity()
        self.attention = TargetAttention(width, *options.attention)
        layers: list[nn.Module] = []
        size = self.inputs.row_width + 3 * width
        for inner in options.hidden:
            layers += [nn.Linear(size, inner), Dice(inner), Dropout(options.dropout)]
            size = inner
        self.tower = nn.Sequential(*layers, nn.Linear(size, 1))

    def logits(self, batch: Batch) -> Tensor:
        items = self.inputs.items(batch)
        v_UI = self.item_norm(items.encoded_U.joined())
        q_BI = v_UI[items.target_B]
        # Attention weights are not normalised: a sum over 50 items and a mean of 5 get the same scale here.
        interest_BI = self.interest_norm(self._interest(q_BI, v_UI, items.history))
        row_BW = self.row_norm(self.inputs.rows(batch).joined())
        x = torch.cat([row_BW, q_BI, interest_BI, q_BI * interest_BI], dim=1)
        out: Tensor = self.tower(x)
        return out[:, 0]

    def candidate_logits(self, batch: Batch, item_BC: Tensor) -> Tensor | None:
        rows, candidates = item_BC.shape
        items = self.inputs.items(replace(batch, target_Q=item_BC.reshape(-1)))
        v_UI = self.item_norm(items.encoded_U.joined())
        q_BCI = v_UI[items.target_B].view(rows, candidates, -1)
        interest_BCI = self.attention.shared(q_BCI, v_UI, items.history)
        short_B = items.history.lengths() < self.min_history
        if bool(short_B.any()):
            mean_BI = mean_pool(v_UI, items.history)
            interest_BCI = torch.where(short_B[:, None, None], mean_BI[:, None], interest_BCI)
        interest_BCI = self.interest_norm(interest_BCI)
        row_BW = self.row_norm(self.inputs.rows(batch).joined())
        row_BCW = row_BW[:, None].expand(rows, candidates, -1)
        x = torch.cat([row_BCW, q_BCI, interest_BCI, q_BCI * interest_BCI], dim=2)
        out: Tensor = self.tower(x.view(rows * candidates, -1))
        return out.view(rows, candidates)

    def _interest(self, q_BI: Tensor, v_UI: Tensor, history: Jagged) -> Tensor:
        """(B, I)"""
        long_B = history.lengths() >= self.min_history
        if isinstance(history, Padded):
            found_BI: Tensor = self.attention(q_BI, v_UI, history)
            return torch.where(long_B[:, None], found_BI, mean_pool(v_UI, history)) if self.min_history else found_BI
        if bool(long_B.all()):
            out_BI: Tensor = self.attention(q_BI, v_UI, history)
            return out_BI
        mean_BI = mean_pool(v_UI, history)
        rows = long_B.nonzero()[:, 0]
        attended = self.attention(q_BI[rows], v_UI, history.take(rows))
        return mean_BI.index_copy(0, rows, attended.to(mean_BI.dtype))


build = Din
