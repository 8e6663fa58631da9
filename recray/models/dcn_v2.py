"""Deep & Cross Network, version 2, with low-rank cross layers (Wang et al., WWW 2021).

    x0 = [norm(embeddings), numbers]                of user, context, candidate and the mean of the history
    cross layer:  x' = x0 * (U V x + b) + x         U: W x R, V: R x W; one W x W matrix if rank = 0 or rank >= W
    parallel:     logit = linear(cross(x0)) + MLP(x0)          stacked:  logit = MLP(cross(x0))

Each cross layer raises the degree of the polynomial of x0 by one.

Shape legend: B rows, W width of x0, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recray.config.models import DcnV2Options as Options
from recray.layers.feature_encoder import mlp
from recray.layers.ranker_inputs import FlatInputs
from recray.loading.batch import Batch, ItemTable
from recray.models import Ranker
from recray.records import DatasetRecord


class Cross(nn.Module):
    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.matrix: nn.Module = nn.Linear(width, width)
        if 0 < rank < width:
            self.matrix = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))

    def forward(self, x0_BW: Tensor, x_BW: Tensor) -> Tensor:
        return torch.addcmul(x_BW, x0_BW, self.matrix(x_BW))


class DcnV2(Ranker):
    def __init__(self, options: Options, dataset: DatasetRecord, items: ItemTable) -> None:
        super().__init__()
        self.stacked = options.structure == "stacked"
        self.inputs = FlatInputs(options, dataset, items)
        width = self.inputs.width
        self.norm = nn.LayerNorm(self.inputs.embedded_width)
        self.cross = nn.ModuleList(Cross(width, options.rank) for _ in range(options.cross_layers))
        self.deep = mlp(width, options.hidden, 1, options.dropout)
        self.out = nn.Linear(width, 1)

    def logits(self, batch: Batch) -> Tensor:
        columns = self.inputs(batch)
        x0_BW = x_BW = torch.cat([self.norm(columns.embedded), columns.numbers], dim=1)
        for layer in self.cross:
            x_BW = layer(x0_BW, x_BW)
        # The paper's linear layer over both branches side by side is the sum of one over each; the MLP has its own.
        out: Tensor = self.deep(x_BW) if self.stacked else self.out(x_BW) + self.deep(x0_BW)
        return out[:, 0]


build = DcnV2
