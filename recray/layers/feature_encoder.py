"""Parts that several models are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recray.kernels.dropout import dropout
from recray.layers.embedding import Table
from recray.loading.batch import Feature, ItemTable, Jagged
from recray.records import Feature as FeatureRecord


def mean_pool(vectors: Tensor | Table, history: Jagged) -> Tensor:
    """(B, D): mean of each row's vectors; zero for an empty row."""
    sparse = isinstance(vectors, Table) and vectors.sparse
    rows, index = vectors.look_up(history.values) if isinstance(vectors, Table) else (vectors, history.values)
    if not len(index):
        nothing = rows.new_zeros(1, rows.shape[1])
        if len(rows) and not sparse:
            # Still a function of the weight: DDP waits for every parameter's gradient.
            nothing = F.embedding(history.offsets[:1], rows) * 0
        return nothing.expand(len(history.offsets) - 1, -1)
    return F.embedding_bag(index, rows, history.offsets[:-1], mode="mean", sparse=sparse)


class Dropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)


class FeatureEncoder(nn.Module):
    """Features to one vector: embeddings of categories (mean over a list), numbers as they are. Output (B, self.width)."""

    def __init__(self, records: list[FeatureRecord], dim: int) -> None:
        super().__init__()
        self._records = records
        self.tables = nn.ModuleDict(
            {f.name: Table(f.cardinality, dim) for f in records if f.kind in ("categorical", "list")}
        )
        self.width = sum(dim if f.kind != "numeric" else 1 for f in records)

    def forward(self, features: dict[str, Feature]) -> Tensor:
        parts = []
        for record in self._records:
            value = features[record.name]
            if isinstance(value, Jagged):
                parts.append(mean_pool(self.tables[record.name], value))  # type: ignore[arg-type]
            elif record.kind == "numeric":
                parts.append(value.float()[:, None])
            else:
                parts.append(self.tables[record.name](value))
        return torch.cat(parts, dim=1)


class ItemFeatures(nn.Module):
    """The features of the item table as buffers on the model's device; ids -> their rows.

    A checkpoint holds the item table itself (recray.training.checkpoint), so they are no part of the model's state.
    """

    def __init__(self, items: ItemTable) -> None:
        super().__init__()
        self._names = list(items.features)
        for name, feature in items.features.items():
            if isinstance(feature, Jagged):
                self.register_buffer(f"{name}_values", feature.values, persistent=False)
                self.register_buffer(f"{name}_offsets", feature.offsets, persistent=False)
            else:
                self.register_buffer(f"{name}_column", feature, persistent=False)

    def forward(self, item_ids: Tensor) -> dict[str, Feature]:
        return {name: select(self._feature(name), item_ids) for name in self._names}

    def _feature(self, name: str) -> Feature:
        if f"{name}_column" in self._buffers:
            return self.get_buffer(f"{name}_column")
        return Jagged(self.get_buffer(f"{name}_values"), self.get_buffer(f"{name}_offsets"))


def mlp(width: int, hidden: list[int], out: int, dropout: float) -> nn.Sequential:
    """Linear, GELU, dropout for each hidden width, then a linear layer to `out`."""
    layers: list[nn.Module] = []
    for inner in hidden:
        layers += [nn.Linear(width, inner), nn.GELU(), Dropout(dropout)]
        width = inner
    return nn.Sequential(*layers, nn.Linear(width, out))


def select(feature: Feature, rows: Tensor, entries: int | None = None) -> Feature:
    """The feature's values of these rows; `entries`: how many a Jagged has there, if known, or a GPU is waited for."""
    if not isinstance(feature, Jagged):
        return feature[rows]
    starts, lengths = feature.offsets[rows], feature.lengths()[rows]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    entries = int(offsets[-1]) if entries is None else entries
    shift = torch.repeat_interleave(starts - offsets[:-1], lengths, output_size=entries)
    return Jagged(feature.values[shift + torch.arange(entries, device=rows.device)], offsets)
