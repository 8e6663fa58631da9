"""Models as `torch.export` programs, and programs as models.

A program takes rectangles, since its sizes may not depend on values: `history` is (B, L) item ids, oldest first, with PAD (0)
after each row's end, and so is a list feature. B, L and the lengths of lists are dynamic.

    query.pt2    (user (B,), history (B, L), features {column: (B,) or (B, M)})              -> (B, D) query vectors
    item.pt2     (item (N,),)                                                                -> (N, D) item vectors
    ranker.pt2   (user (B,), history (B, L), item (B,), features)                            -> (B,) logits

Shape legend: B rows, L longest history, M longest list, N items, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recray.ids import PAD, UNKNOWN
from recray.layers.embedding import Table
from recray.layers.feature_encoder import ItemFeatures
from recray.loading.batch import Batch, Feature
from recray.loading.jagged import Jagged, Padded
from recray.models import Ranker, Retriever
from recray.records import DatasetRecord
from recray.records import Feature as FeatureRecord

QUERY, ITEM, RANKER = "query.pt2", "item.pt2", "ranker.pt2"

Columns = Mapping[str, FeatureRecord]


class _Query(nn.Module):
    def __init__(self, model: Retriever, columns: Columns) -> None:
        super().__init__()
        self.model, self._columns = model, columns

    def forward(self, user: Tensor, history: Tensor, features: dict[str, Tensor]) -> Tensor:
        return self.model.query_vectors(_batch(self._columns, user, history, features)).float()


class _Item(nn.Module):
    def __init__(self, model: Retriever) -> None:
        super().__init__()
        self.model = model

    def forward(self, item: Tensor) -> Tensor:
        return self.model.item_vectors(item).float()


class _Ranker(nn.Module):
    """Ids that the ranker does not know are unknown to it: the retriever may know more items and values."""

    def __init__(self, model: Ranker, columns: Columns, known: DatasetRecord) -> None:
        super().__init__()
        self.model, self._columns, self._items = model, columns, known.num_items
        self._sizes = {one.column: one.cardinality for one in known.features if one.kind != "numeric"}

    def forward(self, user: Tensor, history: Tensor, item: Tensor, features: dict[str, Tensor]) -> Tensor:
        features = {
            name: _clamped(one, self._sizes[name]) if name in self._sizes else one for name, one in features.items()
        }
        batch = _batch(self._columns, user, _clamped(history, self._items), features, _clamped(item, self._items))
        return self.model.logits(batch).float()


def _clamped(ids: Tensor, size: int) -> Tensor:
    return torch.where(ids < size, ids, UNKNOWN)


def _batch(
    columns: Columns, user: Tensor, history: Tensor, features: dict[str, Tensor], item: Tensor | None = None
) -> Batch:
    by_role: dict[str, dict[str, Feature]] = {"user": {}, "context": {}}
    for name, record in columns.items():
        found = features[name]
        by_role[record.role][record.name] = Padded.of(found) if record.kind == "list" else found
    return Batch(user, Padded.of(history), item, user_features=by_role["user"], context=by_role["context"])


def export_retriever(
    model: Retriever, columns: Columns, history_length: int
) -> dict[str, torch.export.ExportedProgram]:
    """Its towers, by file."""
    _prepare(model)
    user, history, features, shapes = _example(columns, history_length)
    query = _export(_Query(model, columns), (user, history, features), shapes)
    item = _export(_Item(model), (user,), ({0: torch.export.Dim("items")},))
    return {QUERY: query, ITEM: item}


def export_ranker(
    model: Ranker, columns: Columns, history_length: int, known: DatasetRecord
) -> dict[str, torch.export.ExportedProgram]:
    """known: what it was trained on."""
    _prepare(model)
    user, history, features, (of_user, of_history, of_features) = _example(columns, history_length)
    inputs = (user, history, user.clone(), features)  # one tensor given twice would be one input
    return {RANKER: _export(_Ranker(model, columns, known), inputs, (of_user, of_history, of_user, of_features))}


def _prepare(model: nn.Module) -> None:
    """Read tables into memory that are on disk; lists of items become rectangles."""
    for module in model.modules():
        if isinstance(module, Table):
            module.read_all()
        elif isinstance(module, ItemFeatures):
            module.pad()


def _example(columns: Columns, history_length: int) -> tuple[Tensor, Tensor, dict[str, Tensor], tuple[Any, Any, Any]]:
    """Inputs of three rows, and which of their dimensions are dynamic."""
    rows = torch.export.Dim("rows")
    user, length = torch.ones(3, dtype=torch.int64), min(history_length, 5)
    history = torch.full((3, length), UNKNOWN)
    history[1, 1:] = PAD
    of_history = {0: rows}
    if history_length > 1:  # a dimension of one size only is not dynamic
        of_history[1] = torch.export.Dim("history", min=1, max=history_length)
    features, of_features = {}, {}
    for number, (name, one) in enumerate(sorted(columns.items())):
        if one.kind == "list":
            features[name] = torch.full((3, 4), UNKNOWN)
            of_features[name] = {0: rows, 1: torch.export.Dim(f"list_{number}")}
        else:
            features[name] = torch.zeros(3) if one.kind == "numeric" else torch.ones(3, dtype=torch.int64)
            of_features[name] = {0: rows}
    return user, history, features, ({0: rows}, of_history, of_features)


def _export(module: nn.Module, inputs: tuple[Any, ...], shapes: tuple[Any, ...]) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module.eval(), inputs, dynamic_shapes=shapes, strict=False)


class ExportedRetriever(Retriever):
    """A retriever whose towers are programs. For inference."""

    def __init__(self, query: torch.export.ExportedProgram, item: torch.export.ExportedProgram) -> None:
        super().__init__()
        self._query, self._item = query.module(), item.module()

    def query_vectors(self, batch: Batch) -> Tensor:
        out: Tensor = self._query(*_inputs(batch))
        return out

    def item_vectors(self, item_ids: Tensor) -> Tensor:
        out: Tensor = self._item(item_ids)
        return out


class ExportedRanker(Ranker):
    """A ranker that is a program. For inference."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self._program = program.module()

    def logits(self, batch: Batch) -> Tensor:
        user, history, features = _inputs(batch)
        out: Tensor = self._program(user, history, batch.target_Q, features)
        return out


def _inputs(batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    found = {
        f"{role}_{name}": _rectangle(one) if isinstance(one, Jagged) else one
        for role, values in (("user", batch.user_features), ("context", batch.context))
        for name, one in values.items()
    }
    return batch.user_B, _rectangle(batch.history), dict(sorted(found.items()))


def _rectangle(lists: Jagged) -> Tensor:
    """(B, longest list or 1): rows end in PAD."""
    lengths_B = lists.lengths()
    out = lists.values.new_full((len(lengths_B), max(1, int(lengths_B.max()) if len(lengths_B) else 1)), PAD)
    out[torch.arange(out.shape[1]) < lengths_B[:, None]] = lists.values
    return out
