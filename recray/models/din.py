"""Deep Interest Network: what of a user's history speaks for this candidate (Zhou et al., KDD 2018).

    weight of a history item k for candidate q:  a(q, k) = MLP([q, k, q - k, q * k])
    interest = norm(sum over the history of a(q, k) k)     logit = MLP([user, context, q, interest, q * interest])

Vectors of items and interests are layer-normalised, without which they take many times
the epochs to become more than noise. A user whose history is shorter than `min_history` takes the plain branch: the mean
of the history instead of attention, row by row inside a batch.

Shape legend: B rows, T history entries of all rows together, U distinct items, I item width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recray.config.models import DinOptions as Options
from recray.layers.dice import Dice
from recray.layers.feature_encoder import Dropout, mean_pool, select
from recray.layers.ranker_inputs import Inputs
from recray.layers.target_attention import TargetAttention
from recray.loading.batch import Batch, ItemTable, Jagged
from recray.models import Examples
from recray.records import DatasetRecord


class Din(nn.Module):
    examples: Examples = "impressions"

    def __init__(self, options: Options, dataset: DatasetRecord, items: ItemTable) -> None:
        super().__init__()
        self.min_history = options.min_history
        self.inputs = Inputs(options, dataset, items)
        width = self.inputs.item_width
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
        v_UI = self.item_norm(items.part_U.joined())
        q_BI = v_UI[items.target_B]
        interest_BI = self.interest_norm(self._interest(q_BI, v_UI, items.history))
        row_BW = self.row_norm(self.inputs.rows(batch).joined())
        x = torch.cat([row_BW, q_BI, interest_BI, q_BI * interest_BI], dim=1)
        out: Tensor = self.tower(x)
        return out[:, 0]

    def _interest(self, q_BI: Tensor, v_UI: Tensor, history: Jagged) -> Tensor:
        long_B = history.lengths() >= self.min_history
        if bool(long_B.all()):
            return self.attention(q_BI, v_UI, history)  # type: ignore[no-any-return]
        plain_BI = mean_pool(v_UI, history)
        rows = long_B.nonzero()[:, 0]
        part = select(history, rows)
        assert isinstance(part, Jagged)
        return plain_BI.index_copy(0, rows, self.attention(q_BI[rows], v_UI, part).to(plain_BI.dtype))


def build(options: Options, dataset: DatasetRecord, items: ItemTable) -> Din:
    return Din(options, dataset, items)
