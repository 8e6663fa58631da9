"""Prepared rows to batches: numpy and torch, no Ray. Which rows are whose says recray.plan.

An example is a training event ("events": its history is the window before it, cut
from the user's list by offsets; "others": it is the rest of the list), a user
("sequences"), or anything that a user was shown ("impressions": chosen or not, its
history is what the user had chosen before that time).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import torch

from recray.data.prepared import PreparedDataset
from recray.models import Examples
from recray.models.batch import FIRST_ID, Batch, Feature, ItemTable, Jagged
from recray.plan import ShardSlice


@dataclass(frozen=True)
class Decay:
    """An event's weight halves with every `half_life` that it lies before `until` (microseconds), to 0 after 20 of them.

    Products with numbers much smaller become denormal, which a CPU takes ten times as long for.
    """

    until: int
    half_life: int

    def __call__(self, time: np.ndarray) -> np.ndarray:
        weight = np.exp2(np.minimum(time - self.until, 0) / self.half_life)
        return np.where(weight < 2.0**-20, 0.0, weight)


@dataclass(frozen=True)
class _Column:
    """Numbers, one per row; or lists of numbers, with offsets."""

    values: np.ndarray
    offsets: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> _Column:
        if self.offsets is None:
            return _Column(self.values[rows])
        starts = self.offsets[rows]
        return _windows(self.values, starts, self.offsets[rows + 1] - starts)

    def tensor(self) -> Feature:
        values = self.values.astype(np.float32 if self.values.dtype.kind == "f" else np.int64)
        if self.offsets is None:
            return torch.from_numpy(values)
        return Jagged(torch.from_numpy(values), torch.from_numpy(self.offsets))


def _windows(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> _Column:
    """Lists values[start : start + length]."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    index = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return _Column(values[index], offsets)


def _concat(columns: list[_Column]) -> _Column:
    if len(columns) == 1:
        return columns[0]
    values = np.concatenate([c.values for c in columns])
    if columns[0].offsets is None:
        return _Column(values)
    lengths = np.concatenate([np.diff(c.offsets) for c in columns if c.offsets is not None])
    return _Column(values, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def _column(array: pa.ChunkedArray) -> _Column:
    flat = array.combine_chunks()
    if not pa.types.is_list(flat.type):
        return _Column(flat.to_numpy(zero_copy_only=False))
    offsets = flat.offsets.to_numpy().astype(np.int64)
    values = flat.values.slice(offsets[0], offsets[-1] - offsets[0])
    return _Column(values.to_numpy(zero_copy_only=False), offsets - offsets[0])


_Piece = dict[str, _Column]


class _Rows:
    """A table of user rows as numpy arrays. Of a labelled log only the positive events are here."""

    def __init__(self, table: pa.Table) -> None:
        self.user = table["user"].to_numpy()
        items, times = _column(table["item"]), _column(table["time"])
        assert items.offsets is not None
        self.item, self.time, self.offsets = items.values, times.values, items.offsets
        self.num_targets = table["num_targets"].to_numpy().astype(np.int64)
        self.user_features = {n[5:]: _column(table[n]) for n in table.column_names if n.startswith("user_")}
        self.context = {}
        for name in table.column_names:
            if name.startswith("context_"):
                flat = pa.chunked_array([table[name].combine_chunks().flatten()])
                self.context[name[8:]] = _column(flat)
        self.weight = _column(table["weight"]).values if "weight" in table.column_names else np.ones(len(self.item))
        if "label" in table.column_names:
            self._keep(_column(table["label"]).values > 0)

    def _keep(self, kept: np.ndarray) -> None:
        """Leave out events; what is left keeps its order."""
        before = np.concatenate([[0], np.cumsum(kept)])
        first = self.first_target()
        self.num_targets = before[self.offsets[1:]] - before[first]
        self.offsets = before[self.offsets]
        self.item, self.time, self.weight = self.item[kept], self.time[kept], self.weight[kept]
        rows = np.flatnonzero(kept)
        self.context = {name: column.take(rows) for name, column in self.context.items()}

    def first_target(self) -> np.ndarray:
        return np.asarray(self.offsets[1:] - self.num_targets)


class _Impressions:
    """Every target of a table, chosen or not, and what its user had chosen before that time.

    Two events of one time have no order: neither is in the history of the other.
    """

    def __init__(self, table: pa.Table) -> None:
        self.chosen = _Rows(table)
        shown = _Rows(table.drop_columns(["label"]))
        label = _column(table["label"]).values
        row = np.repeat(np.arange(len(shown.user)), np.diff(shown.offsets))
        new_time = np.ones(len(label), bool)
        new_time[1:] = (shown.time[1:] != shown.time[:-1]) | (row[1:] != row[:-1])
        first_of_time = np.maximum.accumulate(np.where(new_time, np.arange(len(label)), 0))
        chosen_before = np.concatenate([[0], np.cumsum(label > 0)])[first_of_time]
        at = _windows(np.arange(len(label)), shown.first_target(), shown.num_targets).values
        self.row, self.label, self.end = row[at], label[at], chosen_before[at]
        self.item, self.time, self.weight = shown.item[at], shown.time[at], shown.weight[at]
        self.context = {name: column.take(at) for name, column in shown.context.items()}

    def piece(self, index: np.ndarray, history_length: int, decay: Decay | None) -> _Piece:
        row, end = self.row[index], self.end[index]
        start = np.maximum(self.chosen.offsets[row], end - history_length)
        weight = self.weight[index]
        return {
            "user": _Column(self.chosen.user[row]),
            "history": _windows(self.chosen.item, start, end - start),
            "target": _Column(self.item[index]),
            "label": _Column(self.label[index]),
            "weight": _Column(weight if decay is None else weight * decay(self.time[index])),
            **{f"user_{n}": c.take(row) for n, c in self.chosen.user_features.items()},
            **{f"context_{n}": c.take(index) for n, c in self.context.items()},
        }


def _events(rows: _Rows, index: np.ndarray, history_length: int, decay: Decay | None, others: bool) -> _Piece:
    """Examples of events: `index` counts the targets of the table in order."""
    before = np.concatenate([[0], np.cumsum(rows.num_targets)])
    row = np.searchsorted(before, index, side="right") - 1
    at = rows.first_target()[row] + index - before[row]
    if others:
        history = _others(rows, row, at, history_length)
    else:
        start = np.maximum(rows.offsets[row], at - history_length)
        history = _windows(rows.item, start, at - start)
    return {
        "user": _Column(rows.user[row]),
        "history": history,
        "target": _Column(rows.item[at]),
        "weight": _Column(_weights(rows, at, decay)),
        **{f"user_{n}": c.take(row) for n, c in rows.user_features.items()},
        **{f"context_{n}": c.take(at) for n, c in rows.context.items()},
    }


def _others(rows: _Rows, row: np.ndarray, at: np.ndarray, history_length: int) -> _Column:
    """The last `history_length` events of each row but the one at `at`."""
    end = rows.offsets[row + 1]
    # One more where the target lies inside of the window and leaves it.
    start = np.maximum(rows.offsets[row], end - history_length - (at >= end - history_length))
    place = _windows(np.arange(len(rows.item)), start, end - start)
    assert place.offsets is not None
    kept = place.values != np.repeat(at, np.diff(place.offsets))
    return _Column(rows.item[place.values[kept]], np.concatenate([[0], np.cumsum(kept)])[place.offsets])


def _weights(rows: _Rows, at: np.ndarray, decay: Decay | None) -> np.ndarray:
    """Weights of targets. An unknown item (in validation events, when they are trained on) has no vector to learn."""
    weight = np.where(rows.item[at] < FIRST_ID, 0.0, rows.weight[at])
    return weight if decay is None else weight * decay(rows.time[at])


def _sequences(rows: _Rows, index: np.ndarray, history_length: int, decay: Decay | None) -> _Piece:
    """Examples of users: the last history_length + 1 events; every event with a successor is asked for it."""
    end = rows.offsets[index + 1]
    start = np.maximum(rows.offsets[index], end - history_length - 1)
    lengths = np.maximum(end - start - 1, 0)
    # A history entry is a query when its successor is a target: all are, unless the row begins with context.
    history = _windows(rows.item, start, lengths)
    target = _windows(rows.item, start + 1, lengths)
    place = _windows(np.arange(len(rows.item)), start + 1, lengths)
    is_query = place.values >= np.repeat(rows.first_target()[index], lengths)
    weight = _weights(rows, place.values, decay)
    is_query &= weight > 0
    return {
        "user": _Column(rows.user[index]),
        "history": history,
        "target": _Column(target.values),
        "weight": _Column(weight),
        "query": _Column(is_query),
        **{f"user_{n}": c.take(index) for n, c in rows.user_features.items()},
    }


def _batch(piece: _Piece, examples: Examples, shard: np.ndarray, row: np.ndarray) -> Batch:
    tensors = {name: column.tensor() for name, column in piece.items() if name != "query"}
    history, target, user, weight = tensors["history"], tensors["target"], tensors["user"], tensors["weight"]
    assert isinstance(history, Jagged) and isinstance(user, torch.Tensor)
    assert isinstance(target, torch.Tensor) and isinstance(weight, torch.Tensor)
    label = tensors.get("label")
    assert not isinstance(label, Jagged)
    position = None
    if examples == "sequences":
        position = torch.from_numpy(np.flatnonzero(piece["query"].values))
        target, weight = target[position], weight[position]
    return Batch(
        user_B=user,
        history=history,
        target_Q=target,
        weight_Q=weight,
        label_Q=label,
        position_Q=position,
        user_features={n[5:]: t for n, t in tensors.items() if n.startswith("user_")},
        context={n[8:]: t for n, t in tensors.items() if n.startswith("context_")},
        shard_B=torch.from_numpy(shard),
        row_B=torch.from_numpy(row),
    )


def cut(
    tables: Iterable[tuple[ShardSlice, pa.Table]],
    batch_size: int,
    examples: Examples,
    history_length: int,
    seed: int,
    decay: Decay | None = None,
) -> Iterator[Batch]:
    """Batches of `batch_size` examples from shards in the order given; one batch may span two shards, the last may be smaller."""
    pieces: list[_Piece] = []
    shards: list[np.ndarray] = []
    ids: list[np.ndarray] = []
    held = 0
    for part, table in tables:
        size, piece = _pieces(table, examples, history_length, decay)
        index = np.random.default_rng([seed, part.epoch, 2, part.shard]).permutation(size)[part.start : part.stop]
        at = 0
        while at < len(index):
            take = index[at : at + batch_size - held]
            pieces.append(piece(take))
            shards.append(np.full(len(take), part.shard, np.int64))
            ids.append(take)
            held, at = held + len(take), at + len(take)
            if held == batch_size:
                yield _join(pieces, examples, shards, ids)
                pieces, shards, ids, held = [], [], [], 0
    if held:
        yield _join(pieces, examples, shards, ids)


def _pieces(
    table: pa.Table, examples: Examples, history_length: int, decay: Decay | None
) -> tuple[int, Callable[[np.ndarray], _Piece]]:
    """How many examples a table has, and how to cut some of them."""
    if examples == "impressions":
        shown = _Impressions(table)
        return len(shown.label), lambda index: shown.piece(index, history_length, decay)
    rows = _Rows(table)
    if examples == "sequences":
        return len(rows.user), lambda index: _sequences(rows, index, history_length, decay)
    others = examples == "others"
    return int(rows.num_targets.sum()), lambda index: _events(rows, index, history_length, decay, others)


def impressions(table: pa.Table, batch_size: int, history_length: int) -> Iterator[Batch]:
    """Every impression of a labelled table in order."""
    shown = _Impressions(table)
    for start in range(0, len(shown.label), batch_size):
        index = np.arange(start, min(start + batch_size, len(shown.label)))
        yield _batch(shown.piece(index, history_length, None), "impressions", np.zeros(len(index), np.int64), index)


def _join(pieces: list[_Piece], examples: Examples, shards: list[np.ndarray], ids: list[np.ndarray]) -> Batch:
    joined = {name: _concat([piece[name] for piece in pieces]) for name in pieces[0]}
    return _batch(joined, examples, np.concatenate(shards), np.concatenate(ids))


def padding_like(batch: Batch) -> Batch:
    """One row of weight 0, for a worker that ran out while others have a batch left."""
    one = torch.zeros(1, dtype=torch.int64)

    def empty(feature: Feature) -> Feature:
        if isinstance(feature, Jagged):
            return Jagged(feature.values[:0], torch.zeros(2, dtype=torch.int64))
        return torch.zeros(1, dtype=feature.dtype)

    return Batch(
        user_B=one,
        history=Jagged(one + FIRST_ID, torch.tensor([0, 1])),
        target_Q=one + FIRST_ID,
        weight_Q=torch.zeros(1),
        label_Q=None if batch.label_Q is None else torch.zeros(1),
        position_Q=one if batch.position_Q is not None else None,
        user_features={n: empty(f) for n, f in batch.user_features.items()},
        context={n: empty(f) for n, f in batch.context.items()},
        shard_B=one - 1,
        row_B=one - 1,
    )


@dataclass(frozen=True)
class Question:
    """Queries of an evaluation split: what the model sees, what the user had before, what they went on to choose."""

    batch: Batch
    seen: Jagged  # every item before the query, unknown ones included
    targets: Jagged


def questions(
    table: pa.Table, batch_size: int, history_length: int, queries: Literal["user", "event", "next"]
) -> Iterator[Question]:
    """One query per user row, for all its targets; or one per target; or what comes "next", after all events of a row
    that has any. `batch_size` queries at a time.

    Context features are those of the first target that is asked for, or of the last event.
    """
    rows = _Rows(table)
    row_Q, number_Q = np.flatnonzero(rows.num_targets), rows.num_targets[rows.num_targets > 0]
    at_Q = rows.first_target()[row_Q]
    if queries == "next":
        row_Q = np.flatnonzero(np.diff(rows.offsets))
        at_Q, number_Q = rows.offsets[row_Q + 1], np.zeros(len(row_Q), np.int64)
    if queries == "event":
        place = _windows(np.arange(len(rows.item)), at_Q, number_Q)
        row_Q, at_Q, number_Q = np.repeat(row_Q, number_Q), place.values, np.ones(len(place.values), np.int64)
    for at in range(0, len(row_Q), batch_size):
        part = slice(at, at + batch_size)
        index, middle, number = row_Q[part], at_Q[part], number_Q[part]
        begin = rows.offsets[index]
        start = np.maximum(begin, middle - history_length)
        asked = middle - (number == 0)
        piece = {
            "user": _Column(rows.user[index]),
            "history": _windows(rows.item, start, middle - start),
            "target": _Column(rows.item[asked]),
            "weight": _Column(np.ones(len(index))),
            **{f"user_{n}": c.take(index) for n, c in rows.user_features.items()},
            **{f"context_{n}": c.take(asked) for n, c in rows.context.items()},
        }
        seen = _windows(rows.item, begin, middle - begin).tensor()
        targets = _windows(rows.item, middle, number).tensor()
        assert isinstance(seen, Jagged) and isinstance(targets, Jagged)
        yield Question(_batch(piece, "events", np.zeros(len(index), np.int64), index), seen, targets)


def item_table(dataset: PreparedDataset) -> ItemTable:
    """items.parquet as tensors."""
    table = dataset.items()
    features = {f.name: _column(table[f.name]).tensor() for f in dataset.record.features if f.role == "item"}
    return ItemTable(torch.from_numpy(table["count"].to_numpy().astype(np.float32)), features)
