"""What a ranker sees of a row, as vectors: user, context, the candidate item, and the items of the history.

Rows of a batch hold item ids only; an item's features are looked up in the item table on the device. The candidate and
the history share their tables, and each distinct item of a batch is embedded once, however often it occurs:

    targets 7 9, histories [7 3] []     distinct items 3 7 9     targets at 1 2, histories at [1 0] []

Shape legend: B rows, N rows of any tensor, T history entries of all rows, U distinct items, E width of all embeddings,
M numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recray.config.models import HistoryOptions, RankerOptions
from recray.errors import ConfigError
from recray.layers.embedding import Ids, Table
from recray.layers.feature_encoder import ColumnTables, ItemFeatures, mean_pool
from recray.loading.batch import Batch, Feature, ItemTable, Jagged
from recray.loading.jagged import Padded
from recray.records import DatasetRecord
from recray.records import Feature as FeatureRecord

# Standard deviation of fresh embeddings. Every model normalises them before its first layer, so a small vector is turned
# to another direction by a single optimizer step. With N(0, 1/sqrt(dim)) the same models needed many times the epochs.
_STD = 0.01


@dataclass(frozen=True)
class Encoded:
    """Columns side by side: embeddings of categories (N, E), and numbers (N, M), which have been standardised before."""

    embedded: Tensor
    numbers: Tensor

    def joined(self) -> Tensor:
        """(N, E + M)"""
        return torch.cat([self.embedded, self.numbers], dim=1)

    @staticmethod
    def cat(parts: Sequence[Encoded]) -> Encoded:
        """The columns of all parts, for the same rows."""
        return Encoded(torch.cat([p.embedded for p in parts], dim=1), torch.cat([p.numbers for p in parts], dim=1))


@dataclass(frozen=True)
class BatchItems:
    """The distinct items of a batch; candidates and histories are indices of them."""

    encoded_U: Encoded
    target_B: Tensor
    history: Jagged


class ColumnEncoder(nn.Module):
    """Embeds the id, if there is one, and the feature columns of a role. Widths are those of its `Encoded`."""

    def __init__(
        self, records: list[FeatureRecord], options: RankerOptions, ids: Ids | None = None, num_ids: int = 0
    ) -> None:
        """ids: which ids are embedded, too."""
        super().__init__()
        self.numbers = [f.name for f in records if f.kind == "numeric"]
        self.names = [f.name for f in records if f.kind != "numeric"]
        # A feature that is called as the ids are has the default width: feature_dims means the ids.
        dims = {
            f: options.dim if f in ("user", "item") else options.feature_dims.get(f, options.dim) for f in self.names
        }
        width = options.feature_dims.get(ids, options.dim) if ids else 0
        self.ids = Table(num_ids, width, std=_STD, ids=ids) if ids else None
        self.tables = ColumnTables(
            {
                f.name: Table(f.cardinality, dims[f.name], std=_STD, column=f.column)
                for f in records
                if f.kind != "numeric"
            }
        )
        self.num_numbers = len(self.numbers)
        self.width = width + sum(dims.values()) + self.num_numbers

    def forward(self, features: dict[str, Feature], row_ids: Tensor) -> Encoded:
        """row_ids: (N,), embedded where this encodes ids; else it gives the number of rows."""
        nothing = torch.zeros(row_ids.shape[0], 0, device=row_ids.device)
        embedded = [] if self.ids is None else [self.ids(row_ids)]
        embedded += [self.tables.embed(name, features[name]) for name in self.names]
        numbers = [_column(features[name]) for name in self.numbers]
        return Encoded(torch.cat([nothing, *embedded], dim=1), torch.cat([nothing, *numbers], dim=1))


def _column(feature: Feature) -> Tensor:
    assert isinstance(feature, Tensor)
    return feature[:, None].float()


class RankerInputs(nn.Module):
    """Encodes the rows (user and context) and the items (id and features, for candidates and histories) of a batch."""

    def __init__(self, options: RankerOptions, dataset: DatasetRecord, items: ItemTable) -> None:
        """Raises ConfigError if `feature_dims` names a column that the dataset does not have."""
        super().__init__()
        known = {"user", "item"} | {f.name for f in dataset.features}
        for name in options.feature_dims:
            if name not in known:
                raise ConfigError(
                    f"model.feature_dims names '{name}', which is not a column; allowed: {', '.join(sorted(known))}"
                )
        by_role = {role: [f for f in dataset.features if f.role == role] for role in ("user", "context", "item")}
        self.user = ColumnEncoder(
            by_role["user"], options, "user" if options.user_embedding else None, dataset.num_users
        )
        self.context = ColumnEncoder(by_role["context"], options)
        self.item = ColumnEncoder(by_role["item"], options, "item", dataset.num_items)
        self.num_items = dataset.num_items
        self.item_features = ItemFeatures(items)
        self.row_width = self.user.width + self.context.width

    def rows(self, batch: Batch) -> Encoded:
        """User and context of each row (B)."""
        user = self.user(batch.user_features, batch.user_B)
        return Encoded.cat([user, self.context(batch.context, batch.user_B)])

    def items(self, batch: Batch, with_history: bool = True) -> BatchItems:
        """Candidates, and histories unless `with_history` is False; the history is empty then."""
        assert batch.target_Q is not None
        ids = torch.cat([batch.target_Q, batch.history.values]) if with_history else batch.target_Q
        if isinstance(batch.history, Padded):  # exported: how many distinct items there are depends on values
            distinct, index = ids, torch.arange(ids.shape[0], device=ids.device)
        elif self.num_items <= len(ids):  # embedding the whole catalogue costs less than finding the distinct items
            distinct, index = torch.arange(self.num_items, device=ids.device), ids
        else:
            distinct, index = torch.unique(ids, return_inverse=True)
        num = batch.target_Q.shape[0]
        encoded_U = self.item(self.item_features(distinct), distinct)
        return BatchItems(encoded_U, index[:num], batch.history.with_values(index[num:]))


class FlatInputs(RankerInputs):
    """All columns of a row side by side: user, context, candidate, and unless options.history is "none" the mean of
    the history's items."""

    def __init__(self, options: HistoryOptions, dataset: DatasetRecord, items: ItemTable) -> None:
        super().__init__(options, dataset, items)
        self.history = options.history == "mean"
        parts = [self.user, self.context, self.item, *([self.item] if self.history else [])]
        self.width = sum(part.width for part in parts)  # E + M
        self.num_numbers = sum(part.num_numbers for part in parts)
        self.embedded_width = self.width - self.num_numbers

    def forward(self, batch: Batch) -> Encoded:
        """(B, E) and (B, M)"""
        rows, items = self.rows(batch), self.items(batch, self.history)
        parts = [rows, Encoded(items.encoded_U.embedded[items.target_B], items.encoded_U.numbers[items.target_B])]
        if self.history:
            # One mean over embeddings and numbers together reads the history's indices once.
            mean_BW, at = mean_pool(items.encoded_U.joined(), items.history), self.item.width - self.item.num_numbers
            parts.append(Encoded(mean_BW[:, :at], mean_BW[:, at:]))
        return Encoded.cat(parts)
