"""Prepared rows to training examples: numpy, no torch, no Ray.

An example is a training event ("events": its history is the window before it, cut
from the user's list by offsets; "others": it is the rest of the list), a user
("sequences"), or anything that a user was shown ("impressions": chosen or not, its
history is what the user had chosen before that time).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from recray.ids import FIRST_ITEM
from recray.models import Examples


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
class Column:
    """Numbers, one per row; or lists of numbers, with offsets."""

    values: np.ndarray
    offsets: np.ndarray | None = None

    @staticmethod
    def of(array: pa.ChunkedArray) -> Column:
        flat = array.combine_chunks()
        if not pa.types.is_list(flat.type):
            return Column(flat.to_numpy(zero_copy_only=False))
        offsets = flat.offsets.to_numpy().astype(np.int64)
        values = flat.values.slice(offsets[0], offsets[-1] - offsets[0])
        return Column(values.to_numpy(zero_copy_only=False), offsets - offsets[0])

    def take(self, rows: np.ndarray) -> Column:
        if self.offsets is None:
            return Column(self.values[rows])
        starts = self.offsets[rows]
        return windows(self.values, starts, self.offsets[rows + 1] - starts)


def windows(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Column:
    """Lists values[start : start + length]."""
    index, offsets = _places(starts, lengths)
    return Column(values[index], offsets)


def _places(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """start, start + 1, ..., of every list, and the lists' offsets."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    index = np.repeat(starts - offsets[:-1], lengths)
    index += np.arange(len(index))
    return index, offsets


class Rows:
    """A table of user rows as numpy arrays. Of a labelled log only the positive events are here."""

    def __init__(self, table: pa.Table) -> None:
        self.user = table["user"].to_numpy()
        items, times = Column.of(table["item"]), Column.of(table["time"])
        assert items.offsets is not None
        self.item, self.time, self.offsets = items.values, times.values, items.offsets
        self.num_targets = table["num_targets"].to_numpy().astype(np.int64)
        self.user_features = {n[5:]: Column.of(table[n]) for n in table.column_names if n.startswith("user_")}
        self.context = {}
        for name in table.column_names:
            if name.startswith("context_"):
                flat = pa.chunked_array([table[name].combine_chunks().flatten()])
                self.context[name[8:]] = Column.of(flat)
        self.weight = Column.of(table["weight"]).values if "weight" in table.column_names else np.ones(len(self.item))
        if "label" in table.column_names:
            self._keep(Column.of(table["label"]).values > 0)

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

    def targets(self) -> np.ndarray:
        """Places of all targets, row by row."""
        if self.num_targets.sum() == len(self.item):
            return np.arange(len(self.item))
        return _places(self.first_target(), self.num_targets)[0]


@dataclass(frozen=True)
class _List:
    """An example's list is values[start : stop] but the place `skip`: names of columns that hold these numbers."""

    values: np.ndarray
    start: str
    stop: str
    skip: str | None = None


class ExampleTable:
    """All examples of a table, by columns."""

    def __init__(self, columns: dict[str, np.ndarray], lists: dict[str, _List]) -> None:
        """Columns whose name begins with '_' are places in the lists' values and in no batch."""
        self._columns = {
            name: values.astype(np.float32 if values.dtype.kind == "f" else np.int32, copy=False)
            for name, values in columns.items()
        }
        self._lists = lists

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def take(self, index: np.ndarray) -> ExampleTable:
        """These examples in this order. Column by column: one stays in the cache while it is read at random."""
        # mode="clip" writes where it is to be written; "raise", the default, writes twice.
        return ExampleTable({name: c.take(index, mode="clip") for name, c in self._columns.items()}, self._lists)

    def slice(self, start: int, stop: int) -> dict[str, Column]:
        """Columns of the examples start to stop, int64 and float32."""
        numbers = {name: _numbers(values[start:stop]) for name, values in self._columns.items()}
        piece = {name: Column(values) for name, values in numbers.items() if not name.startswith("_")}
        places: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
        for name, one in self._lists.items():
            key = (one.start, one.stop)
            if key not in places:
                place, offsets = _places(numbers[one.start], numbers[one.stop] - numbers[one.start])
                if one.skip is not None:
                    kept = place != np.repeat(numbers[one.skip], np.diff(offsets))
                    place, offsets = place[kept], np.concatenate([[0], np.cumsum(kept)])[offsets]
                places[key] = place, offsets
            place, offsets = places[key]
            piece[name] = Column(one.values[place], offsets)
        return piece


def example_table(table: pa.Table, examples: Examples, history_length: int, decay: Decay | None) -> ExampleTable:
    """The examples of a table of user rows."""
    if examples == "impressions":
        return _impressions(table, history_length, decay)
    rows = Rows(table)
    if examples == "sequences":
        return _sequences(rows, history_length, decay)
    return _events(rows, history_length, decay, others=examples == "others")


def _events(rows: Rows, history_length: int, decay: Decay | None, others: bool) -> ExampleTable:
    row, at = np.repeat(np.arange(len(rows.user)), rows.num_targets), rows.targets()
    begin, stop = rows.offsets[row], rows.offsets[row + 1] if others else at
    # Of the others one more where the target lies inside of the window and leaves it.
    start = np.maximum(begin, stop - history_length - (others & (at >= stop - history_length)))
    columns = {"user": rows.user[row], "target": rows.item[at], "weight": _weights(rows, decay)[at]}
    columns |= {"_start": start, "_stop": stop} | ({"_skip": at} if others else {})
    lists = {"history": _List(_numbers(rows.item), "_start", "_stop", "_skip" if others else None)}
    return _with_features(columns, lists, rows.user_features, row, rows.context, at)


def _sequences(rows: Rows, history_length: int, decay: Decay | None) -> ExampleTable:
    """The last history_length + 1 events of a user; every event with a successor is asked for it.

    A history entry is a query when its successor is a target: all are, unless the row begins with context. The
    weight of every other entry is 0.
    """
    end = rows.offsets[1:]
    start = np.maximum(rows.offsets[:-1], end - history_length - 1)
    weight = np.zeros(len(rows.item), np.float32)
    target = rows.targets()
    weight[target] = _weights(rows, decay)[target]
    item = _numbers(rows.item)
    lists = {
        name: _List(values, "_start", "_stop")
        for name, values in (("history", item), ("target", item[1:]), ("weight", weight[1:]))
    }
    columns = {"user": rows.user, "_start": start, "_stop": np.maximum(end - 1, start)}
    return _with_features(columns, lists, rows.user_features, np.arange(len(rows.user)), {}, start)


def _impressions(table: pa.Table, history_length: int, decay: Decay | None) -> ExampleTable:
    """Every target, chosen or not, and what its user had chosen before that time.

    Two events of one time have no order: neither is in the history of the other.
    """
    chosen = Rows(table)
    shown = Rows(table.drop_columns(["label"]))
    label = Column.of(table["label"]).values
    row = np.repeat(np.arange(len(shown.user)), np.diff(shown.offsets))
    new_time = np.ones(len(label), bool)
    new_time[1:] = (shown.time[1:] != shown.time[:-1]) | (row[1:] != row[:-1])
    first_of_time = np.maximum.accumulate(np.where(new_time, np.arange(len(label)), 0))
    chosen_before = np.concatenate([[0], np.cumsum(label > 0)])[first_of_time]
    at = shown.targets()
    row, end = row[at], chosen_before[at]
    weight = shown.weight if decay is None else shown.weight * decay(shown.time)
    columns = {
        "user": chosen.user[row],
        "target": shown.item[at],
        "label": label[at],
        "weight": weight[at],
        "_start": np.maximum(chosen.offsets[row], end - history_length),
        "_stop": end,
    }
    lists = {"history": _List(_numbers(chosen.item), "_start", "_stop")}
    return _with_features(columns, lists, chosen.user_features, row, shown.context, at)


def _with_features(
    columns: dict[str, np.ndarray],
    lists: dict[str, _List],
    user_features: dict[str, Column],
    row: np.ndarray,
    context: dict[str, Column],
    at: np.ndarray,
) -> ExampleTable:
    """Every example's features: of its user's row, and of the event at its place."""
    for prefix, features, index in (("user", user_features, row), ("context", context, at)):
        for name, column in features.items():
            name = f"{prefix}_{name}"
            whole = len(index) == len(column.values) and prefix == "context"
            if column.offsets is None:
                columns[name] = column.values if whole else column.values[index]
            else:
                columns |= {f"_{name}": column.offsets[index], f"_{name}_stop": column.offsets[index + 1]}
                lists[name] = _List(_numbers(column.values), f"_{name}", f"_{name}_stop")
    return ExampleTable(columns, lists)


def _numbers(values: np.ndarray) -> np.ndarray:
    """float32 or int64; not copied where it is that already."""
    return values.astype(np.float32 if values.dtype.kind == "f" else np.int64, copy=False)


def _weights(rows: Rows, decay: Decay | None) -> np.ndarray:
    """Of all events. An unknown item (in validation events, when they are trained on) has no vector to learn."""
    weight = np.where(rows.item < FIRST_ITEM, 0.0, rows.weight)
    return weight if decay is None else weight * decay(rows.time)
