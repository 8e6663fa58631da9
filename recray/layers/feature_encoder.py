"""Features and histories as vectors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from recray.kernels.dropout import dropout
from recray.layers.embedding import Table
from recray.loading.batch import Feature, ItemTable, Jagged, select
from recray.loading.jagged import Padded
from recray.records import Feature as FeatureRecord


def mean_pool(vectors: Tensor | Table, lists: Jagged) -> Tensor:
    """(B, D): mean of each list's vectors, 0 for an empty list. lists: ids of a table, or indices of rows of `vectors`."""
    if isinstance(lists, Padded):
        return _padded_mean(vectors, lists)
    sparse = isinstance(vectors, Table) and vectors.sparse
    rows, index = vectors.look_up(lists.values) if isinstance(vectors, Table) else (vectors, lists.values)
    return F.embedding_bag(index, rows, lists.offsets[:-1], mode="mean", sparse=sparse)


def _padded_mean(vectors: Tensor | Table, lists: Padded) -> Tensor:
    taken_TD = vectors(lists.values) if isinstance(vectors, Table) else vectors[lists.values]
    taken_BLD = taken_TD.view(*lists.real_BL.shape, -1) * lists.real_BL[:, :, None]
    return taken_BLD.sum(1) / lists.lengths().clamp(min=1)[:, None]


class ColumnTables(nn.ModuleList):
    """A table for each column. Modules are numbered, since torch refuses names such as "type" or "price.usd"."""

    def __init__(self, tables: dict[str, Table]) -> None:
        super().__init__(tables.values())
        self._number = {name: number for number, name in enumerate(tables)}

    def embed(self, name: str, feature: Feature) -> Tensor:
        """(B, D): the vector of each row's category; of a list feature the mean."""
        table = self[self._number[name]]
        assert isinstance(table, Table)
        out: Tensor = mean_pool(table, feature) if isinstance(feature, Jagged) else table(feature)
        return out


class FeatureEncoder(nn.Module):
    """Features as vectors side by side: embeddings of categories (of a list the mean), numbers unchanged."""

    def __init__(self, records: list[FeatureRecord], dim: int) -> None:
        """dim: width of each embedding."""
        super().__init__()
        self._records = records
        self.tables = ColumnTables(
            {f.name: Table(f.cardinality, dim, column=f.column) for f in records if f.kind != "numeric"}
        )
        self.width = sum(dim if f.kind != "numeric" else 1 for f in records)

    def forward(self, features: dict[str, Feature]) -> list[Tensor]:
        """(B, w) of each record in order; the widths add up to `self.width`."""
        return [self._encode(record, features[record.name]) for record in self._records]

    def _encode(self, record: FeatureRecord, feature: Feature) -> Tensor:
        if record.kind == "numeric":
            assert isinstance(feature, Tensor)
            return feature.float()[:, None]
        return self.tables.embed(record.name, feature)


class ItemFeatures(nn.Module):
    """The item table's features, looked up by item id on the model's device.

    They are buffers, so that they move with the model, but not part of its state: a checkpoint holds the item table itself.
    """

    def __init__(self, items: ItemTable) -> None:
        super().__init__()
        self._names = list(items.features)
        self.longest: dict[str, int] | None = None  # entries of the longest list of each feature, once they are padded
        for number, feature in enumerate(items.features.values()):
            if isinstance(feature, Jagged):
                self.register_buffer(f"values_{number}", feature.values, persistent=False)
                self.register_buffer(f"offsets_{number}", feature.offsets, persistent=False)
            else:
                self.register_buffer(f"column_{number}", feature, persistent=False)

    def forward(self, item_ids: Tensor) -> dict[str, Feature]:
        """Each feature of the items with these ids (N,): (N,) values, or N lists."""
        found = {name: self._feature(number) for number, name in enumerate(self._names)}
        if self.longest is None:
            return {name: select(feature, item_ids) for name, feature in found.items()}
        return {
            name: Padded.taken(feature, item_ids, self.longest[name])
            if isinstance(feature, Jagged)
            else feature[item_ids]
            for name, feature in found.items()
        }

    def pad(self) -> None:
        """Return lists as Padded from now on, for `torch.export`."""
        found = {name: self._feature(number) for number, name in enumerate(self._names)}
        self.longest = {name: int(lists.lengths().max()) for name, lists in found.items() if isinstance(lists, Jagged)}

    def _feature(self, number: int) -> Feature:
        if f"column_{number}" in self._buffers:
            return self.get_buffer(f"column_{number}")
        return Jagged(self.get_buffer(f"values_{number}"), self.get_buffer(f"offsets_{number}"))


class Dropout(nn.Dropout):
    """nn.Dropout with the CPU kernel of recray.kernels.dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)


def mlp(width: int, hidden: list[int], out: int, dropout: float) -> nn.Sequential:
    """Linear, GELU and dropout for each hidden width, then a linear layer of `out` outputs."""
    layers: list[nn.Module] = []
    for inner in hidden:
        layers += [nn.Linear(width, inner), nn.GELU(), Dropout(dropout)]
        width = inner
    return nn.Sequential(*layers, nn.Linear(width, out))
