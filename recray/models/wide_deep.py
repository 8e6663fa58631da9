"""Wide & Deep, the floor that other rankers must clear (Cheng et al., DLRS 2016).

logit = sum of a weight per category and number  +  MLP([embeddings, numbers, mean of the history])
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recray.config.models import WideDeepOptions as Options
from recray.layers.feature_encoder import mlp
from recray.layers.ranker_inputs import Inputs
from recray.loading.batch import Batch, ItemTable
from recray.models import Examples
from recray.records import DatasetRecord


class WideDeep(nn.Module):
    examples: Examples = "impressions"

    def __init__(self, options: Options, dataset: DatasetRecord, items: ItemTable) -> None:
        super().__init__()
        self.history = options.history
        self.deep = Inputs(options, dataset, items)
        self.wide = Inputs(options.model_copy(update={"dim": 1, "feature_dims": {}}), dataset, items)
        numbers = self.wide.num_numbers(options.history)
        self.wide_numbers = nn.Linear(numbers, 1, bias=False) if numbers else None
        self.norm = nn.LayerNorm(self.deep.embedded_width(options.history))
        self.tower = mlp(self.deep.width(options.history), options.hidden, 1, options.dropout)

    def logits(self, batch: Batch) -> Tensor:
        wide, deep = self.wide.flat(batch, self.history), self.deep.flat(batch, self.history)
        x = torch.cat([self.norm(deep.embedded), deep.numbers], dim=1)
        out: Tensor = self.tower(x)[:, 0] + wide.embedded.sum(1)
        return out if self.wide_numbers is None else out + self.wide_numbers(wide.numbers)[:, 0]


def build(options: Options, dataset: DatasetRecord, items: ItemTable) -> WideDeep:
    return WideDeep(options, dataset, items)
