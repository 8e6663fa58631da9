"""DLRM: a bottom MLP of the numbers, inner products of all pairs of vectors, a top MLP (Naumov et al., 2019).

    e = [MLP(numbers), norm(embeddings)]     logit = MLP([e, e_i . e_j for i < j])

The embeddings are those of user, context, candidate and the mean of the history.

Shape legend: B rows, F vectors of a row, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recray.config.models import DlrmOptions as Options
from recray.layers.feature_encoder import mlp
from recray.layers.ranker_inputs import FlatInputs
from recray.loading.batch import Batch, ItemTable
from recray.models import Ranker
from recray.records import DatasetRecord


class Dlrm(Ranker):
    def __init__(self, options: Options, dataset: DatasetRecord, items: ItemTable) -> None:
        super().__init__()
        self.dim = options.dim
        self.inputs = FlatInputs(options, dataset, items)
        numbers = self.inputs.num_numbers
        self.norm = nn.LayerNorm(self.inputs.embedded_width)
        self.bottom = mlp(numbers, options.bottom, options.dim, 0.0) if numbers else None
        vectors = self.inputs.embedded_width // options.dim + (self.bottom is not None)
        self.pairs: Tensor
        self.register_buffer("pairs", torch.triu_indices(vectors, vectors, offset=1), persistent=False)
        # The vectors are inputs, too: inner products alone lose what a single column says.
        width = self.pairs.shape[1] + vectors * options.dim
        self.top = mlp(width, options.hidden, 1, options.dropout)

    def logits(self, batch: Batch) -> Tensor:
        columns = self.inputs(batch)
        flat_BW = self.norm(columns.embedded)
        if self.bottom is not None:
            # Under autocast the MLP's output is narrower than the norm's.
            flat_BW = torch.cat([self.bottom(columns.numbers).to(flat_BW.dtype), flat_BW], dim=1)
        e_BFD = flat_BW.unflatten(1, (-1, self.dim))
        dots_BFF = e_BFD @ e_BFD.transpose(1, 2)
        out: Tensor = self.top(torch.cat([flat_BW, dots_BFF[:, self.pairs[0], self.pairs[1]]], dim=1))
        return out[:, 0]


build = Dlrm
