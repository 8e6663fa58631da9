"""Examples to batches. Which examples a worker trains on is decided by recray.loading.sampler."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from recray.data.dataset import PreparedDataset
from recray.ids import FIRST_ITEM
from recray.loading.batch import Batch, Feature, ItemTable
from recray.loading.examples import Decay, Examples, Fields, UserRows, example_table, impression_table
from recray.loading.jagged import Column, Jagged, offsets_from_lengths, range_index
from recray.loading.sampler import ShardSlice


def iter_batches(
    tables: Iterable[tuple[ShardSlice, pa.Table]],
    batch_size: int,
    examples: Examples,
    history_length: int,
    seed: int,
    decay: Decay | None = None,
) -> Iterator[Batch]:
    """Batches of `batch_size` examples from shards in the order given.

    The examples of a shard are permuted, and with `decay` sampled, by (seed, epoch, shard), the same on every worker. A batch
    may span two shards; the last one may be smaller.
    """
    pieces: list[Fields[Column]] = []
    held = 0
    for part, table in tables:
        found = example_table(table, examples, history_length, decay)
        index = found.order(np.random.default_rng([seed, part.epoch, 2, part.shard]))[part.start : part.stop]
        found, at = found.take(index), 0
        while at < len(index):
            stop = min(len(index), at + batch_size - held)
            pieces.append(found.slice(at, stop))
            held, at = held + stop - at, stop
            if held == batch_size:
                yield _batch(Fields.combine(pieces, _concat))
                pieces, held = [], 0
    if held:
        yield _batch(Fields.combine(pieces, _concat))


def impressions(table: pa.Table, batch_size: int, history_length: int) -> Iterator[Batch]:
    """Every impression of a labelled table, in order."""
    shown = impression_table(table, history_length)
    for start in range(0, len(shown), batch_size):
        yield _batch(shown.slice(start, min(start + batch_size, len(shown))))


def padding_like(batch: Batch) -> Batch:
    """One row of weight 0, for a worker that has no batch left when others do."""
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
    )


@dataclass(frozen=True)
class EvalQuery:
    """Some evaluation queries, one per row of `batch`."""

    batch: Batch
    seen: Jagged  # every item of the user before the query, unknown ones included; the history is the end of it
    targets: Jagged  # what the user chose from then on; empty where that is not known
    time_B: (
        Tensor  # int64: when the query is asked, the time of its first target; events of that time are not known yet
    )


def eval_queries(
    table: pa.Table, batch_size: int, history_length: int, queries: Literal["user", "event", "next"]
) -> Iterator[EvalQuery]:
    """Evaluation queries of a table of user rows, `batch_size` at a time.

    queries: "user" is one query per row for all its targets, "event" one per target, and "next" one after all events of
    a row. Context features are those of the first target, or with "next" of the last event.
    """
    rows = UserRows(table)
    row_Q, number_Q = np.flatnonzero(rows.num_targets), rows.num_targets[rows.num_targets > 0]
    at_Q = rows.first_target()[row_Q]
    if queries == "next":
        row_Q = np.flatnonzero(np.diff(rows.offsets))
        at_Q, number_Q = rows.offsets[row_Q + 1], np.zeros(len(row_Q), np.int64)
    if queries == "event":
        row_Q, at_Q = np.repeat(row_Q, number_Q), range_index(at_Q, number_Q)[0]
        number_Q = np.ones(len(at_Q), np.int64)
    for first in range(0, len(row_Q), batch_size):
        part = slice(first, first + batch_size)
        row, at, number = row_Q[part], at_Q[part], number_Q[part]
        begin = rows.offsets[row]
        start = np.maximum(begin, at - history_length)
        event = at - (number == 0)  # whose context features the query has
        fields = Fields(
            user=Column(rows.user[row]),
            history=Column.from_ranges(rows.item, start, at - start),
            target=Column(rows.item[event]),
            weight=Column(np.ones(len(row))),
            user_features={name: column.take(row) for name, column in rows.user_features.items()},
            context={name: column.take(event) for name, column in rows.context.items()},
        )
        seen = _jagged(Column.from_ranges(rows.item, begin, at - begin))
        targets = _jagged(Column.from_ranges(rows.item, at, number))
        time_B = torch.from_numpy(rows.time[event] + (number == 0))  # "next": just after the last event
        yield EvalQuery(_batch(fields), seen, targets, time_B)


def item_table(dataset: PreparedDataset) -> ItemTable:
    """items.parquet as tensors."""
    table = dataset.items()
    features = {f.name: feature_tensor(Column.of(table[f.column])) for f in dataset.record.features if f.role == "item"}
    return ItemTable(torch.from_numpy(table["count"].to_numpy().astype(np.float32)), features)


def _batch(fields: Fields[Column]) -> Batch:
    position, target, weight = None, fields.target, fields.weight
    if target.offsets is not None:  # sequences: every entry with a weight is a query
        entry = np.flatnonzero(weight.values)
        position = torch.from_numpy(entry)
        target, weight = Column(target.values[entry]), Column(weight.values[entry])
    return Batch(
        user_B=_numbers(fields.user),
        history=_jagged(fields.history),
        target_Q=_numbers(target),
        weight_Q=_numbers(weight),
        label_Q=None if fields.label is None else _numbers(fields.label),
        position_Q=position,
        user_features={name: feature_tensor(column) for name, column in fields.user_features.items()},
        context={name: feature_tensor(column) for name, column in fields.context.items()},
    )


def _concat(columns: list[Column]) -> Column:
    if len(columns) == 1:
        return columns[0]
    values = np.concatenate([column.values for column in columns])
    lengths = [np.diff(column.offsets) for column in columns if column.offsets is not None]
    return Column(values, offsets_from_lengths(np.concatenate(lengths)) if lengths else None)


def feature_tensor(column: Column) -> Feature:
    """The column as int64 or float32 tensors."""
    return _numbers(column) if column.offsets is None else _jagged(column)


def _jagged(column: Column) -> Jagged:
    assert column.offsets is not None
    return Jagged(_numbers(column), torch.from_numpy(column.offsets))


def _numbers(column: Column) -> Tensor:
    """The values as int64 or float32. Arrow's buffers are read-only, so they are copied; slices are copies already."""
    kind = np.float32 if column.values.dtype.kind == "f" else np.int64
    return torch.from_numpy(column.values.astype(kind, copy=not column.values.flags.writeable))
