"""The positive events of a prepared dataset, shard by shard, for baselines that count them.

A row of a later split begins with the user's earlier events, which belong to other splits. `iter_events` gives every event
of a split once: the targets of its rows, and with `data.min_history` also the events that have too few before them to be
targets.

Shape legend: E events.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from recray.data.dataset import PreparedDataset
from recray.ids import PAD, UNKNOWN
from recray.loading.jagged import Column


class Events(NamedTuple):
    """Some events, in the order of their users."""

    user: np.ndarray  # (E,) int64
    item: np.ndarray  # (E,) int64; UNKNOWN where the model does not know the item
    time: np.ndarray  # (E,) int64 microseconds, or positions


class Steps(NamedTuple):
    """Some events, each with the one before it of the same user."""

    time: np.ndarray  # (E,) int64 microseconds
    item: np.ndarray  # (E,) int64
    previous: np.ndarray  # (E,) int64; PAD where the user had chosen nothing


def iter_events(dataset: PreparedDataset, splits: Iterable[str]) -> Iterator[Events]:
    """All positive events of these splits, one shard at a time."""
    for split in splits:
        for table in itertools.chain(dataset.iter_tables(split), dataset.iter_early(split)):
            found = _new_events(table)
            # Files may hold items that this model does not know, behind those that it knows.
            yield found._replace(item=np.where(found.item < dataset.record.num_items, found.item, UNKNOWN))


def read_steps(dataset: PreparedDataset, splits: Iterable[str], since: int | None = None) -> Steps:
    """All positive events of these splits, in any order; those at or after `since` if it is given."""
    none = np.zeros(0, np.int64)
    found = [Steps(none, none, none)]
    for split in splits:
        for table in itertools.chain(dataset.iter_tables(split), dataset.iter_early(split)):
            item, time, new = *_lists(table), _is_new(table)
            assert item.offsets is not None
            if since is not None:
                new &= time.values >= since
            at = np.flatnonzero(new)
            previous = item.values[np.maximum(at - 1, 0)].astype(np.int64)
            previous[np.isin(at, item.offsets)] = PAD
            known = dataset.record.num_items
            ids = (np.where(one < known, one, UNKNOWN) for one in (item.values[at].astype(np.int64), previous))
            found.append(Steps(time.values[at].astype(np.int64), *ids))
    return Steps(*(np.concatenate(column) for column in zip(*found, strict=True)))


def event_counts(
    dataset: PreparedDataset, splits: Iterable[str], begin: int | None = None, end: int | None = None
) -> np.ndarray:
    """(N,) how often each item was chosen in these splits, at begin <= time < end if they are given."""
    counts_N = np.zeros(dataset.record.num_items, np.int64)
    for _, item, time in iter_events(dataset, splits):
        if begin is not None:
            item = item[(time >= begin) & (time < end)]
        counts_N += np.bincount(item, minlength=len(counts_N))
    return counts_N


def num_events(dataset: PreparedDataset, splits: Iterable[str]) -> int:
    """Positive targets of these splits."""
    return sum(dataset.record.counts[f"events_{split}"] for split in splits)


def _lists(table: pa.Table) -> tuple[Column, Column]:
    return Column.of(table["item"]), Column.of(table["time"])


def _is_new(table: pa.Table) -> np.ndarray:
    """Which entries of the lists are positive targets: the last `num_targets` of a row, without those of label 0."""
    offsets = Column.of(table["item"]).offsets
    assert offsets is not None
    lengths = np.diff(offsets)
    from_end = np.repeat(offsets[1:], lengths) - np.arange(offsets[-1])
    new = from_end <= np.repeat(table["num_targets"].to_numpy(), lengths)
    if "label" in table.column_names:
        new &= Column.of(table["label"]).values > 0
    return np.asarray(new)


def _new_events(table: pa.Table) -> Events:
    """The positive targets of user rows."""
    (item, time), new = _lists(table), _is_new(table)
    assert item.offsets is not None
    user = np.repeat(table["user"].to_numpy(), np.diff(item.offsets))
    return Events(*(x[new].astype(np.int64) for x in (user, item.values, time.values)))
