"""Wide & Deep, the baseline of the rankers (Cheng et al., DLRS 2016).

    logit = sum of a weight per category + w . numbers  +  MLP([norm(embeddings), numbers])

The wide part is a linear model of the same columns: its weight per category is an embedding of width 1. The columns are
user, context, candidate and the mean of the history's items.

Shape legend: B rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recray.config.models import WideDeepOptions as Options
from recray.layers.feature_encoder import mlp
from recray.layers.ranker_inputs import FlatInputs
from recray.loading.batch import Batch, ItemTable
from recray.models import Ranker
from recray.records import DatasetRecord


class WideDeep(Ranker):
    def __init__(self, options: Options, dataset: DatasetRecord, items: ItemTable) -> None:
        super().__init__()
        self.deep = FlatInputs(options, dataset, items)
        self.wide = FlatInputs(options.model_copy(update={"dim": 1, "feature_dims": {}}), dataset, items)
        numbers = self.wide.num_numbers
        self.wide_numbers = nn.Linear(numbers, 1, bias=False) if numbers else None
        self.norm = nn.LayerNorm(self.deep.embedded_width)
        self.tower = mlp(self.deep.width, options.hidden, 1, options.dropout)

    def logits(self, batch: Batch) -> Tensor:
        wide, deep = self.wide(batch), self.deep(batch)
        x = torch.cat([self.norm(deep.embedded), deep.numbers], dim=1)
        out: Tensor = self.tower(x)[:, 0] + wide.embedded.sum(1)
        return out if self.wide_numbers is None else out + self.wide_numbers(wide.numbers)[:, 0]


build = WideDeep
