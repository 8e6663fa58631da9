"""What a ranker sees of a row, as vectors: user, context, the candidate item, and the items of the history.

Item features are looked up in the item table on the device; they are in no row. The
candidate and the history share their tables, and an item is embedded once a batch
however often it occurs in it.

Shape legend: B rows, T history entries of all rows together, U distinct items,
E width of all categories of a part side by side, M numbers of a part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from recray.config import RankerOptions
from recray.errors import ConfigError
from recray.layers.embedding import Ids, Table
from recray.layers.feature_encoder import ItemFeatures, mean_pool
from recray.loading.batch import Batch, Feature, ItemTable, Jagged
from recray.records import DatasetRecord
from recray.records import Feature as FeatureRecord

# Small, and normalised by every model before its first layer: an optimizer's step then turns a fresh vector at once.
# With N(0, 1/sqrt(dim)) the same models needed many times the epochs.
_STD = 0.01


@dataclass(frozen=True)
class Part:
    """Columns side by side: categories' embeddings (., E) in order of names, and numbers (., M)."""

    embedded: Tensor
    numbers: Tensor

    def joined(self) -> Tensor:
        return torch.cat([self.embedded, self.numbers], dim=1)


@dataclass(frozen=True)
class Items:
    """The distinct items of a batch; candidates and histories point to their rows."""

    part_U: Part
    target_B: Tensor  # index of each row's candidate
    history: Jagged  # indices of each row's history


class Columns(nn.Module):
    """Embeds the columns of one part."""

    def __init__(self, records: list[FeatureRecord], ids: dict[Ids, int], options: RankerOptions) -> None:
        super().__init__()
        self.numbers = [f.name for f in records if f.kind == "numeric"]
        rows: dict[str, int] = {name: count for name, count in ids.items()}
        rows |= {f.name: f.cardinality for f in records if f.kind != "numeric"}
        kinds: dict[str, Ids] = {name: name for name in ids}
        dims = {name: options.feature_dims.get(name, options.dim) for name in rows}
        self.tables = nn.ModuleDict(
            {f"{n}_": Table(rows[n], dims[n], std=_STD, ids=kinds.get(n, "feature")) for n in rows}
        )
        self.names = list(rows)
        self.num_numbers = len(self.numbers)
        self.width = sum(dims.values()) + self.num_numbers

    def forward(self, features: dict[str, Feature], row_ids: Tensor) -> Part:
        """row_ids: any tensor with an entry per row, for a part without columns."""
        nothing = torch.zeros(len(row_ids), 0, device=row_ids.device)
        embedded = [self._embed(name, features[name]) for name in self.names]
        numbers = [features[name][:, None].float() for name in self.numbers]  # type: ignore[index]
        return Part(torch.cat([nothing, *embedded], dim=1), torch.cat([nothing, *numbers], dim=1))

    def _embed(self, name: str, feature: Feature) -> Tensor:
        embedding = self.tables[f"{name}_"]
        assert isinstance(embedding, Table)
        if isinstance(feature, Jagged):
            return mean_pool(embedding, feature)
        out: Tensor = embedding(feature)
        return out


class Inputs(nn.Module):
    """All parts. `row`: user and context; `item`: id and features, of the candidate and of the history alike."""

    def __init__(self, options: RankerOptions, dataset: DatasetRecord, items: ItemTable) -> None:
        super().__init__()
        known = {"user", "item"} | {f.name for f in dataset.features}
        for name in options.feature_dims:
            if name not in known:
                raise ConfigError(f"model.feature_dims names '{name}'; columns there: {', '.join(sorted(known))}")
        self.user_embedding = options.user_embedding
        by_role = {role: [f for f in dataset.features if f.role == role] for role in ("user", "context", "item")}
        ids: dict[Ids, int] = {"user": dataset.num_users} if options.user_embedding else {}
        self.user = Columns(by_role["user"], ids, options)
        self.context = Columns(by_role["context"], {}, options)
        self.item = Columns(by_role["item"], {"item": dataset.num_items}, options)
        self.num_items = dataset.num_items
        self.item_features = ItemFeatures(items)

    @property
    def item_width(self) -> int:
        return self.item.width

    @property
    def row_width(self) -> int:
        return self.user.width + self.context.width

    def rows(self, batch: Batch) -> Part:
        ids: dict[str, Feature] = {"user": batch.user_B} if self.user_embedding else {}
        user = self.user(ids | batch.user_features, batch.user_B)
        context = self.context(batch.context, batch.user_B)
        return Part(
            torch.cat([user.embedded, context.embedded], dim=1), torch.cat([user.numbers, context.numbers], dim=1)
        )

    def flat(self, batch: Batch, history: Literal["mean", "none"]) -> Part:
        """All there is of a row: user and context, candidate, mean of the history."""
        rows, items = self.rows(batch), self.items(batch, with_history=history == "mean")
        parts = [rows, Part(items.part_U.embedded[items.target_B], items.part_U.numbers[items.target_B])]
        if history == "mean":
            mean_BW, at = mean_pool(items.part_U.joined(), items.history), self.item.width - self.item.num_numbers
            parts.append(Part(mean_BW[:, :at], mean_BW[:, at:]))
        return Part(torch.cat([p.embedded for p in parts], dim=1), torch.cat([p.numbers for p in parts], dim=1))

    def width(self, history: Literal["mean", "none"]) -> int:
        """Of `flat`, categories and numbers together."""
        return self.row_width + self.item_width * (2 if history == "mean" else 1)

    def embedded_width(self, history: Literal["mean", "none"]) -> int:
        """Of the categories of `flat`."""
        return self.width(history) - self.num_numbers(history)

    def num_numbers(self, history: Literal["mean", "none"]) -> int:
        """Of `flat`."""
        items = self.item.num_numbers * (2 if history == "mean" else 1)
        return self.user.num_numbers + self.context.num_numbers + items

    def items(self, batch: Batch, with_history: bool = True) -> Items:
        assert batch.target_Q is not None
        ids = torch.cat([batch.target_Q, batch.history.values]) if with_history else batch.target_Q
        if self.num_items <= len(ids):  # the whole catalogue costs less than finding what is distinct
            distinct, index = torch.arange(self.num_items, device=ids.device), ids
        else:
            distinct, index = torch.unique(ids, return_inverse=True)
        ids_and_features: dict[str, Feature] = {"item": distinct} | self.item_features(distinct)
        part = self.item(ids_and_features, distinct)
        num = len(batch.target_Q)
        return Items(part, index[:num], Jagged(index[num:], batch.history.offsets))
