"""DLRM: numbers through a bottom MLP, inner products of all pairs of embeddings, a top MLP (Naumov et al., 2019).

    z = MLP(numbers)          logit = MLP([z, <e_i, e_j> for i < j])     e: z, every category, the mean of the history (normalised)

Shape legend: B rows, F vectors of a row, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recray.config.models import DlrmOptions as Options
from recray.layers.feature_encoder import mlp
from recray.layers.ranker_inputs import Inputs
from recray.loading.batch import Batch, ItemTable
from recray.models import Examples
from recray.records import DatasetRecord


class Dlrm(nn.Module):
    examples: Examples = "impressions"

    def __init__(self, options: Options, dataset: DatasetRecord, items: ItemTable) -> None:
        super().__init__()
        self.history, self.dim = options.history, options.dim
        self.inputs = Inputs(options, dataset, items)
        numbers = self.inputs.num_numbers(options.history)
        self.norm = nn.LayerNorm(self.inputs.embedded_width(options.history))
        self.bottom = mlp(numbers, options.bottom, options.dim, 0.0) if numbers else None
        vectors = (self.inputs.width(options.history) - numbers) // options.dim + (self.bottom is not None)
        self.pairs: Tensor
        self.register_buffer("pairs", torch.triu_indices(vectors, vectors, offset=1), persistent=False)
        # The vectors themselves go in too: inner products alone lose what one column says by itself.
        width = self.pairs.shape[1] + vectors * options.dim
        self.top = mlp(width, options.hidden, 1, options.dropout)

    def logits(self, batch: Batch) -> Tensor:
        part = self.inputs.flat(batch, self.history)
        flat_BW = self.norm(part.embedded)
        if self.bottom is not None:
            flat_BW = torch.cat([self.bottom(part.numbers).to(flat_BW.dtype), flat_BW], dim=1)
        e_BFD = flat_BW.view(len(flat_BW), -1, self.dim)
        dots_BFF = e_BFD @ e_BFD.transpose(1, 2)
        out: Tensor = self.top(torch.cat([flat_BW, dots_BFF[:, self.pairs[0], self.pairs[1]]], dim=1))
        return out[:, 0]


def build(options: Options, dataset: DatasetRecord, items: ItemTable) -> Dlrm:
    return Dlrm(options, dataset, items)
