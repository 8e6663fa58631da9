"""Training examples, cut from the user rows of a shard. numpy only: importing this module does not load torch.

A shard has one row per user. `num_targets` counts the events at the end of the lists that belong to the shard's split;
the events before them are context from earlier splits:

    user  item          time          num_targets  user_age  context_hour
    7     [4, 9, 2, 5]  [1, 3, 8, 9]  2            3         [23, 1, 6, 7]

With history_length = 2, this row becomes

    "events"       one example per target, its history is the window before it:  [4, 9] -> 2    [9, 2] -> 5
    "others"       the same with all other events of the user as candidates for the history, for logs without an order:
                   [9, 5] -> 2    [9, 2] -> 5
    "sequences"    one example per user, which trains on every position at once:  [9, 2] -> [2, 5]
    "impressions"  one example per target, whether it was chosen (label 1) or only shown (label 0); its history is what
                   the user chose strictly before the time of the target

Histories overlap, so an `ExampleTable` stores for each example where its list begins and ends in the shard's values. They
are gathered only when a batch is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

import numpy as np
import pyarrow as pa

from recray.ids import FIRST_ITEM
from recray.loading.jagged import Column, offsets_from_lengths, range_index

Examples = Literal["events", "others", "sequences", "impressions"]

T = TypeVar("T")
U = TypeVar("U")

# Prefixes of the feature columns of a shard. Context features have one entry per event.
_USER, _CONTEXT = "user_", "context_"


@dataclass(frozen=True)
class Decay:
    """0.5 ** (age / half_life) of events, where age is how long before `until` they are (all in microseconds).

    Examples are sampled in proportion to it. As weights in the loss these numbers leave a batch few examples that count,
    and a batch of old events only, which is divided by the sum of its weights, as large a step as any other.
    After 20 half-lives it is 0.

    half_life: None for events that do not age. replay: factor of events before `new_from`, which the checkpoint that
    training starts from has seen.
    """

    until: int
    half_life: int | None
    new_from: int | None = None
    replay: float = 1.0

    def __call__(self, time: np.ndarray) -> np.ndarray:
        decayed = np.ones(len(time))
        if self.half_life is not None:
            decayed = np.exp2(np.minimum(time - self.until, 0) / self.half_life)
            decayed = np.where(decayed < 2.0**-20, 0.0, decayed)
        return decayed if self.new_from is None else np.where(time < self.new_from, self.replay * decayed, decayed)


@dataclass(frozen=True)
class Fields(Generic[T]):
    """The parts of examples, each as a T: numpy columns, or the places in a table that they are gathered from."""

    user: T
    history: T  # lists
    target: T  # one per example; lists in "sequences"
    weight: T  # as target
    label: T | None = None  # "impressions" only
    user_features: dict[str, T] = field(default_factory=dict)
    context: dict[str, T] = field(default_factory=dict)

    def map(self, function: Callable[[T], U]) -> Fields[U]:
        return Fields.combine([self], lambda parts: function(parts[0]))

    @staticmethod
    def combine(parts: Sequence[Fields[T]], function: Callable[[list[T]], U]) -> Fields[U]:
        """Each field of the result is `function` of that field of all parts."""
        labels = [part.label for part in parts if part.label is not None]
        return Fields(
            user=function([part.user for part in parts]),
            history=function([part.history for part in parts]),
            target=function([part.target for part in parts]),
            weight=function([part.weight for part in parts]),
            label=function(labels) if labels else None,
            user_features={n: function([p.user_features[n] for p in parts]) for n in parts[0].user_features},
            context={n: function([p.context[n] for p in parts]) for n in parts[0].context},
        )


class UserRows:
    """A table of user rows as numpy arrays. Of a labelled log it keeps the positive events only.

    Shapes: R rows, E events of all rows. user, num_targets (R,); item, time, weight (E,); offsets (R + 1,).
    """

    def __init__(self, table: pa.Table) -> None:
        names = table.column_names
        self.user = table["user"].to_numpy()
        items, times = Column.of(table["item"]), Column.of(table["time"])
        assert items.offsets is not None
        self.item, self.time, self.offsets = items.values, times.values, items.offsets
        self.num_targets = table["num_targets"].to_numpy().astype(np.int64)
        self.user_features = {n.removeprefix(_USER): Column.of(table[n]) for n in names if n.startswith(_USER)}
        self.context = {
            n.removeprefix(_CONTEXT): Column.of(pa.chunked_array([table[n].combine_chunks().flatten()]))
            for n in names
            if n.startswith(_CONTEXT)
        }
        self.weight = Column.of(table["weight"]).values if "weight" in names else np.ones(len(self.item))
        if "label" in names:
            self._keep(Column.of(table["label"]).values > 0)

    def _keep(self, kept: np.ndarray) -> None:
        """Drop the events that are not marked in `kept` (E,)."""
        before = offsets_from_lengths(kept)
        first = self.first_target()
        self.num_targets = before[self.offsets[1:]] - before[first]
        self.offsets = before[self.offsets]
        self.item, self.time, self.weight = self.item[kept], self.time[kept], self.weight[kept]
        events = np.flatnonzero(kept)
        self.context = {name: column.take(events) for name, column in self.context.items()}

    def first_target(self) -> np.ndarray:
        """(R,) index of each row's first target."""
        return np.asarray(self.offsets[1:] - self.num_targets)

    def targets(self) -> np.ndarray:
        """Indices of all targets, row by row."""
        if self.num_targets.sum() == len(self.item):
            return np.arange(len(self.item))
        return range_index(self.first_target(), self.num_targets)[0]


@dataclass(frozen=True)
class _Ranges:
    """One range of indices per example: start to stop, without the index `skip` if it is given."""

    start: np.ndarray
    stop: np.ndarray
    skip: np.ndarray | None = None

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> _Ranges:
        return _Ranges(function(self.start), function(self.stop), None if self.skip is None else function(self.skip))

    def slice(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices and offsets of the ranges first to last."""
        part = self.map(lambda x: _wide(x[first:last]))
        index, offsets = range_index(part.start, part.stop - part.start)
        if part.skip is not None:
            kept = index != np.repeat(part.skip, np.diff(offsets))
            index, offsets = index[kept], offsets_from_lengths(kept)[offsets]
        return index, offsets


@dataclass(frozen=True)
class _Lists:
    """A field with one list per example: a range of values that all examples of the shard share."""

    values: np.ndarray
    ranges: int  # which of the table's ranges; several fields may use the same


_Field = np.ndarray | _Lists  # an array has one entry per example


class ExampleTable:
    """All examples of a shard, column by column.

    chance: (examples,) in [0, 1], in proportion to which examples are in an epoch; None: each is in every epoch, once.
    """

    def __init__(self, fields: Fields[_Field], ranges: list[_Ranges], chance: np.ndarray | None = None) -> None:
        self._fields, self._ranges, self._chance = fields, ranges, chance

    @staticmethod
    def of(fields: Fields[_Field], ranges: list[_Ranges], chance: np.ndarray | None) -> ExampleTable:
        """Numbers are stored in 4 bytes: a permutation reads and writes all of them once an epoch."""
        small = fields.map(lambda x: x if isinstance(x, _Lists) else _narrow(x))
        return ExampleTable(small, [one.map(_narrow) for one in ranges], chance)

    @property
    def per_epoch(self) -> int:
        """Examples in an epoch, the same number in each: the sum of the chances rounded down, or 1 if it is less."""
        if self._chance is None:
            return len(self)
        total = float(self._chance.sum())
        return max(int(total + 1e-6), 1) if total else 0  # the last digits of a sum may differ between machines

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """(per_epoch,) the examples of an epoch in random order.

        With chances it is a systematic sample: on a line on which each example is as long as its chance, marks at equal
        distances from a random start take the examples that they fall on. The expected count of example i in an epoch is
        per_epoch * chance[i] / sum(chance); no example is taken twice if the sum is 1 or more.
        """
        count = self.per_epoch
        if self._chance is None or not count:
            return rng.permutation(count)
        end = np.cumsum(self._chance)
        marks = (np.arange(count) + rng.random()) * (end[-1] / count)
        index = np.searchsorted(end, np.minimum(marks, np.nextafter(end[-1], 0)), side="right")
        return np.asarray(index[rng.permutation(count)])

    def __len__(self) -> int:
        assert isinstance(self._fields.user, np.ndarray)
        return len(self._fields.user)

    def take(self, index: np.ndarray) -> ExampleTable:
        """These examples in this order. Column by column, so that a column stays in the cache while it is read at random."""

        def taken(values: np.ndarray) -> np.ndarray:
            # mode="clip" writes to the result directly; "raise", the default, goes through a buffer.
            return values.take(index, mode="clip")

        fields = self._fields.map(lambda x: x if isinstance(x, _Lists) else taken(x))
        return ExampleTable(fields, [one.map(taken) for one in self._ranges])

    def slice(self, start: int, stop: int) -> Fields[Column]:
        """Examples start to stop as int64 and float32 columns."""
        found = [one.slice(start, stop) for one in self._ranges]

        def column(field: _Field) -> Column:
            if isinstance(field, np.ndarray):
                return Column(_wide(field[start:stop]))
            index, offsets = found[field.ranges]
            return Column(field.values[index], offsets)

        return self._fields.map(column)


def example_table(table: pa.Table, examples: Examples, history_length: int, decay: Decay | None) -> ExampleTable:
    """The examples of a table of user rows. decay: sample them by age."""
    if examples == "impressions":
        return impression_table(table, history_length, _weights, decay)
    rows = UserRows(table)
    if examples == "sequences":
        return _sequences(rows, history_length, decay)
    return _events(rows, history_length, decay, others=examples == "others")


def _events(rows: UserRows, history_length: int, decay: Decay | None, others: bool) -> ExampleTable:
    row, at = np.repeat(np.arange(len(rows.user)), rows.num_targets), rows.targets()
    begin, stop = rows.offsets[row], rows.offsets[row + 1] if others else at
    # With `others` the window takes one more event if the target lies inside of it, because the target is left out.
    start = np.maximum(begin, stop - history_length - (others & (at >= stop - history_length)))
    ranges = [_Ranges(start, stop, at if others else None)]
    weight = _weights(rows)[at]
    fields: Fields[_Field] = Fields(
        user=rows.user[row],
        history=_Lists(_wide(rows.item), 0),
        target=rows.item[at],
        weight=weight,
        user_features=_features(rows.user_features, row, ranges),
        context=_features(rows.context, _slice_if_all(at, len(rows.item)), ranges),
    )
    return ExampleTable.of(fields, ranges, None if decay is None else decay(rows.time[at]) * (weight > 0))


def _sequences(rows: UserRows, history_length: int, decay: Decay | None) -> ExampleTable:
    """The last history_length + 1 events of a user; each but the last one is a query for its successor.

    Weights are 0 where the successor is no target: at the row's context from earlier splits.
    """
    end = rows.offsets[1:]
    start = np.maximum(rows.offsets[:-1], end - history_length - 1)
    weight = np.zeros(len(rows.item), np.float32)
    target = rows.targets()
    weight[target] = _weights(rows)[target]
    chance = None
    if decay is not None:
        # A row is taken for all its targets at once: its chance is the sum of theirs, at most 1. Divided by it, the decayed
        # weights of its targets have the decayed weights as their means over epochs.
        row = np.repeat(np.arange(len(rows.user)), np.diff(rows.offsets))
        decayed = decay(rows.time) * (weight > 0) * (np.arange(len(row)) > start[row])
        chance = np.minimum(np.bincount(row, decayed, len(rows.user)), 1.0)
        weight *= np.divide(decayed, chance[row], out=np.zeros(len(row)), where=decayed > 0)
    item = _wide(rows.item)
    # The same ranges of three arrays: entry i of the shifted ones belongs to the event after history entry i.
    ranges = [_Ranges(start, np.maximum(end - 1, start))]
    fields: Fields[_Field] = Fields(
        user=rows.user,
        history=_Lists(item, 0),
        target=_Lists(item[1:], 0),
        weight=_Lists(weight[1:], 0),
        user_features=_features(rows.user_features, slice(None), ranges),
    )
    return ExampleTable.of(fields, ranges, chance)


def impression_table(
    table: pa.Table,
    history_length: int,
    weigh: Callable[[UserRows], np.ndarray] = lambda rows: rows.weight,
    decay: Decay | None = None,
) -> ExampleTable:
    """Every target, chosen or not, with what its user had chosen before that time.

    Events of the same time have no order: none is in the history of another. weigh: (E,) weights of the events.
    """
    chosen = UserRows(table)
    shown = UserRows(table.drop_columns(["label"]))
    label = Column.of(table["label"]).values
    row = np.repeat(np.arange(len(shown.user)), np.diff(shown.offsets))
    new_time = np.ones(len(label), bool)
    new_time[1:] = (shown.time[1:] != shown.time[:-1]) | (row[1:] != row[:-1])
    first_of_time = np.maximum.accumulate(np.where(new_time, np.arange(len(label)), 0))
    chosen_before = offsets_from_lengths(label > 0)[first_of_time]
    at = shown.targets()
    row, end = row[at], chosen_before[at]
    ranges = [_Ranges(np.maximum(chosen.offsets[row], end - history_length), end)]
    weight = weigh(shown)[at]
    fields: Fields[_Field] = Fields(
        user=chosen.user[row],
        history=_Lists(_wide(chosen.item), 0),
        target=shown.item[at],
        weight=weight,
        label=label[at],
        user_features=_features(chosen.user_features, row, ranges),
        context=_features(shown.context, _slice_if_all(at, len(shown.item)), ranges),
    )
    return ExampleTable.of(fields, ranges, None if decay is None else decay(shown.time[at]) * (weight > 0))


def _slice_if_all(index: np.ndarray, size: int) -> np.ndarray | slice:
    """Increasing indices of `size` entries as a slice if they are all of them, so that columns are not copied."""
    return slice(None) if len(index) == size else index


def _features(columns: dict[str, Column], index: np.ndarray | slice, ranges: list[_Ranges]) -> dict[str, _Field]:
    """Features of the rows or events at `index`, one entry per example; list features add their ranges."""
    found: dict[str, _Field] = {}
    for name, column in columns.items():
        if column.offsets is None:
            found[name] = column.values[index]
        else:
            found[name] = _Lists(_wide(column.values), len(ranges))
            ranges.append(_Ranges(column.offsets[:-1][index], column.offsets[1:][index]))
    return found


def _narrow(values: np.ndarray) -> np.ndarray:
    """float32 or int32, without a copy if it is that already."""
    return values.astype(np.float32 if values.dtype.kind == "f" else np.int32, copy=False)


def _wide(values: np.ndarray) -> np.ndarray:
    """float32 or int64, the types that models take; without a copy if it is that already."""
    return values.astype(np.float32 if values.dtype.kind == "f" else np.int64, copy=False)


def _weights(rows: UserRows) -> np.ndarray:
    """(E,) weight of every event; 0 for unknown items, which a refit may meet in validation events.

    They have no vector to train, and next to drawn negatives, which are known items, they would tell a ranker the label.
    """
    return np.where(rows.item < FIRST_ITEM, 0.0, rows.weight)
