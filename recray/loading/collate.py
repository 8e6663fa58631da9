"""Training examples to batches: numpy and torch, no Ray. Which rows are whose says recray.loading.sampler."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import torch

from recray.data.dataset import PreparedDataset
from recray.ids import FIRST_ITEM
from recray.loading.batch import Batch, Feature, ItemTable, Jagged
from recray.loading.examples import Column, Decay, Rows, example_table, windows
from recray.loading.sampler import ShardSlice
from recray.models import Examples

_Piece = dict[str, Column]


def _tensor(column: Column) -> Feature:
    # Arrow's memory is not torch's to write to; what was cut is new already.
    kind = np.float32 if column.values.dtype.kind == "f" else np.int64
    values = column.values.astype(kind, copy=not column.values.flags.writeable)
    if column.offsets is None:
        return torch.from_numpy(values)
    return Jagged(torch.from_numpy(values), torch.from_numpy(column.offsets))


def _concat(columns: list[Column]) -> Column:
    if len(columns) == 1:
        return columns[0]
    values = np.concatenate([c.values for c in columns])
    if columns[0].offsets is None:
        return Column(values)
    lengths = np.concatenate([np.diff(c.offsets) for c in columns if c.offsets is not None])
    return Column(values, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def _batch(piece: _Piece, shard: np.ndarray, row: np.ndarray) -> Batch:
    tensors = {name: _tensor(column) for name, column in piece.items()}
    history, target, user, weight = tensors["history"], tensors["target"], tensors["user"], tensors["weight"]
    position = None
    if isinstance(target, Jagged) and isinstance(weight, Jagged):  # sequences: every entry that weighs anything
        position = torch.from_numpy(np.flatnonzero(piece["weight"].values))
        target, weight = target.values[position], weight.values[position]
    label = tensors.get("label")
    assert isinstance(history, Jagged) and isinstance(user, torch.Tensor) and not isinstance(label, Jagged)
    assert isinstance(target, torch.Tensor) and isinstance(weight, torch.Tensor)
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


def iter_batches(
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
        found = example_table(table, examples, history_length, decay)
        index = np.random.default_rng([seed, part.epoch, 2, part.shard]).permutation(len(found))[part.start : part.stop]
        found, at = found.take(index), 0
        while at < len(index):
            stop = min(len(index), at + batch_size - held)
            pieces.append(found.slice(at, stop))
            shards.append(np.full(stop - at, part.shard, np.int64))
            ids.append(index[at:stop])
            held, at = held + stop - at, stop
            if held == batch_size:
                yield _join(pieces, shards, ids)
                pieces, shards, ids, held = [], [], [], 0
    if held:
        yield _join(pieces, shards, ids)


def impressions(table: pa.Table, batch_size: int, history_length: int) -> Iterator[Batch]:
    """Every impression of a labelled table in order."""
    shown = example_table(table, "impressions", history_length, None)
    for start in range(0, len(shown), batch_size):
        index = np.arange(start, min(start + batch_size, len(shown)))
        yield _batch(shown.slice(start, start + len(index)), np.zeros(len(index), np.int64), index)


def _join(pieces: list[_Piece], shards: list[np.ndarray], ids: list[np.ndarray]) -> Batch:
    joined = {name: _concat([piece[name] for piece in pieces]) for name in pieces[0]}
    return _batch(joined, np.concatenate(shards), np.concatenate(ids))


def padding_like(batch: Batch) -> Batch:
    """One row of weight 0, for a worker that ran out while others have a batch left."""
    one = torch.zeros(1, dtype=torch.int64)

    def empty(feature: Feature) -> Feature:
        if isinstance(feature, Jagged):
            return Jagged(feature.values[:0], torch.zeros(2, dtype=torch.int64))
        return torch.zeros(1, dtype=feature.dtype)

    return Batch(
        user_B=one,
        history=Jagged(one + FIRST_ITEM, torch.tensor([0, 1])),
        target_Q=one + FIRST_ITEM,
        weight_Q=torch.zeros(1),
        label_Q=None if batch.label_Q is None else torch.zeros(1),
        position_Q=one if batch.position_Q is not None else None,
        user_features={n: empty(f) for n, f in batch.user_features.items()},
        context={n: empty(f) for n, f in batch.context.items()},
        shard_B=one - 1,
        row_B=one - 1,
    )


@dataclass(frozen=True)
class EvalQuery:
    """Queries of an evaluation split: what the model sees, what the user had before, what they went on to choose."""

    batch: Batch
    seen: Jagged  # every item before the query, unknown ones included
    targets: Jagged


def eval_queries(
    table: pa.Table, batch_size: int, history_length: int, queries: Literal["user", "event", "next"]
) -> Iterator[EvalQuery]:
    """One query per user row, for all its targets; or one per target; or what comes "next", after all events of a row
    that has any. `batch_size` queries at a time.

    Context features are those of the first target that is asked for, or of the last event.
    """
    rows = Rows(table)
    row_Q, number_Q = np.flatnonzero(rows.num_targets), rows.num_targets[rows.num_targets > 0]
    at_Q = rows.first_target()[row_Q]
    if queries == "next":
        row_Q = np.flatnonzero(np.diff(rows.offsets))
        at_Q, number_Q = rows.offsets[row_Q + 1], np.zeros(len(row_Q), np.int64)
    if queries == "event":
        place = windows(np.arange(len(rows.item)), at_Q, number_Q)
        row_Q, at_Q, number_Q = np.repeat(row_Q, number_Q), place.values, np.ones(len(place.values), np.int64)
    for at in range(0, len(row_Q), batch_size):
        part = slice(at, at + batch_size)
        index, middle, number = row_Q[part], at_Q[part], number_Q[part]
        begin = rows.offsets[index]
        start = np.maximum(begin, middle - history_length)
        asked = middle - (number == 0)
        piece = {
            "user": Column(rows.user[index]),
            "history": windows(rows.item, start, middle - start),
            "target": Column(rows.item[asked]),
            "weight": Column(np.ones(len(index))),
            **{f"user_{n}": c.take(index) for n, c in rows.user_features.items()},
            **{f"context_{n}": c.take(asked) for n, c in rows.context.items()},
        }
        seen = _tensor(windows(rows.item, begin, middle - begin))
        targets = _tensor(windows(rows.item, middle, number))
        assert isinstance(seen, Jagged) and isinstance(targets, Jagged)
        yield EvalQuery(_batch(piece, np.zeros(len(index), np.int64), index), seen, targets)


def item_table(dataset: PreparedDataset) -> ItemTable:
    """items.parquet as tensors."""
    table = dataset.items()
    features = {f.name: _tensor(Column.of(table[f.name])) for f in dataset.record.features if f.role == "item"}
    return ItemTable(torch.from_numpy(table["count"].to_numpy().astype(np.float32)), features)
