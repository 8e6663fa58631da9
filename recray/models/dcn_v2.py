"""Deep & Cross Network, version 2, with low-rank cross layers (Wang et al., WWW 2021).

    x0 = [norm(embeddings, mean of the history), numbers]
    cross layer:  x' = x0 * (U V x + b) + x         U: W x R, V: R x W, or one W x W matrix where rank is 0
    parallel:     logit = linear([cross(x0), MLP(x0)])          stacked:  logit = MLP(cross(x0))

Shape legend: B rows, W width of x0, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recray.config.models import DcnV2Options as Options
from recray.layers.feature_encoder import mlp
from recray.layers.ranker_inputs import Inputs
from recray.loading.batch import Batch, ItemTable
from recray.models import Examples
from recray.records import DatasetRecord


class Cross(nn.Module):
    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.matrix: nn.Module = nn.Linear(width, width)
        if 0 < rank < width:
            self.matrix = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))

    def forward(self, x0_BW: Tensor, x_BW: Tensor) -> Tensor:
        return torch.addcmul(x_BW, x0_BW, self.matrix(x_BW))


class DcnV2(nn.Module):
    examples: Examples = "impressions"

    def __init__(self, options: Options, dataset: DatasetRecord, items: ItemTable) -> None:
        super().__init__()
        self.history, self.stacked = options.history, options.structure == "stacked"
        self.inputs = Inputs(options, dataset, items)
        width = self.inputs.width(options.history)
        self.norm = nn.LayerNorm(self.inputs.embedded_width(options.history))
        self.cross = nn.ModuleList(Cross(width, options.rank) for _ in range(options.cross_layers))
        self.deep = mlp(width, options.hidden, 1, options.dropout)
        self.out = nn.Linear(width, 1)

    def logits(self, batch: Batch) -> Tensor:
        part = self.inputs.flat(batch, self.history)
        x0_BW = x_BW = torch.cat([self.norm(part.embedded), part.numbers], dim=1)
        for layer in self.cross:
            x_BW = layer(x0_BW, x_BW)
        # Linear of both side by side is the sum of a linear of each.
        out: Tensor = self.deep(x_BW) if self.stacked else self.out(x_BW) + self.deep(x0_BW)
        return out[:, 0]


def build(options: Options, dataset: DatasetRecord, items: ItemTable) -> DcnV2:
    return DcnV2(options, dataset, items)
