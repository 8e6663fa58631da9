"""Raw keys and values to what models read.

`Inputs` encodes them as training did; `Rows` are encoded rows. What is known of users comes from a `Users`: the files of a
prepared dataset, read when they are asked for, or a table in memory.

Shape legend: B rows, N items.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
import torch

from recray.data import features
from recray.data.dataset import PreparedDataset
from recray.errors import DataError
from recray.ids import FIRST_ITEM, NUM_RESERVED, PAD, UNKNOWN
from recray.loading.batch import Batch
from recray.loading.collate import feature_tensor
from recray.loading.examples import UserRows
from recray.loading.jagged import Column, Jagged
from recray.records import Feature

# What pyarrow raises for values that it cannot convert: integers of more than 64 bits and lone surrogates among them.
_NOT_OF_TYPE = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError, UnicodeError)
Keys: TypeAlias = "Sequence[Any] | pa.Array | pa.ChunkedArray | np.ndarray"


@dataclass(frozen=True)
class Rows:
    """Rows for a model, encoded. Features are known by their columns: "user_age", "context_device"."""

    user: pa.Array  # int32 ids
    history: pa.ListArray  # list<int32>: all items that the user has chosen, oldest first
    columns: dict[str, pa.Array]

    def __len__(self) -> int:
        return len(self.user)

    def take(self, index: np.ndarray) -> Rows:
        at = pa.array(index)
        return Rows(self.user.take(at), self.history.take(at), {n: c.take(at) for n, c in self.columns.items()})

    def slice(self, start: int, length: int) -> Rows:
        columns = {name: column.slice(start, length) for name, column in self.columns.items()}
        return Rows(self.user.slice(start, length), self.history.slice(start, length), columns)

    @staticmethod
    def concat(parts: Sequence[Rows]) -> Rows:
        columns = {name: pa.concat_arrays([part.columns[name] for part in parts]) for name in parts[0].columns}
        return Rows(
            pa.concat_arrays([part.user for part in parts]), pa.concat_arrays([part.history for part in parts]), columns
        )


class KeyIndex:
    """Places of keys in an array of distinct keys. The first look-up hashes them, later ones do not."""

    def __init__(self, keys: pa.Array) -> None:
        self.keys = keys

    @cached_property
    def _place(self) -> dict[Any, int]:
        return {key: place for place, key in enumerate(self.keys.to_pylist())}

    def find(self, keys: pa.Array) -> np.ndarray:
        """(B,) int64 places; -1 for keys that are not there."""
        place = self._place
        return np.array([place.get(key, -1) for key in keys.to_pylist()], np.int64)


class Users(Protocol):
    """What is known of users after all events of a dataset."""

    @property
    def keys(self) -> pa.Array:
        """The key of every user, in any order."""

    def find(self, keys: pa.Array) -> tuple[Rows, np.ndarray]:
        """Rows of users, and (B,) which of them each key asks for; -1 for users of whom nothing is known."""


class UserTable:
    """Users in memory."""

    def __init__(self, keys: pa.Array, rows: Rows) -> None:
        self._index, self.rows = KeyIndex(keys), rows

    @property
    def keys(self) -> pa.Array:
        return self._index.keys

    def find(self, keys: pa.Array) -> tuple[Rows, np.ndarray]:
        place = self._index.find(keys)
        known = place >= 0
        return self.rows.take(place[known]), np.where(known, np.cumsum(known) - 1, -1)


class DatasetUsers:
    """Users of a prepared dataset, whose files are read when a user is asked for."""

    def __init__(self, dataset: PreparedDataset, columns: Mapping[str, Feature]) -> None:
        self._dataset, self._features = dataset, columns
        self._files = [file.rpartition("/")[2] for file in dataset.user_files]

    @cached_property
    def _table(self) -> tuple[KeyIndex, np.ndarray, np.ndarray]:
        """Of each user the key, the number of its file, and the id."""
        tables = [self._dataset.read_file(f"users/{file}") for file in self._files]
        both = pa.concat_tables(tables)
        file = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        return KeyIndex(both["user"].combine_chunks()), file, both["user_id"].to_numpy()

    @property
    def keys(self) -> pa.Array:
        return self._table[0].keys

    def find(self, keys: pa.Array) -> tuple[Rows, np.ndarray]:
        index, file_U, id_U = self._table
        place = index.find(keys)
        wanted = np.unique(place[place >= 0])
        parts = [strangers(self._features, 1)]
        for number in np.unique(file_U[wanted]):
            ids = pa.array(id_U[wanted[file_U[wanted] == number]].astype(np.int32))
            parts += [self._rows(table) for table in self._dataset.latest(self._files[number], ids)]
        rows = Rows.concat(parts)
        rows = rows.slice(1, len(rows) - 1)
        row_of = np.full(int(id_U.max(initial=0)) + 1, -1)
        row_of[rows.user.to_numpy()] = np.arange(len(rows))
        # Of a known user whose events were all dropped there is no row.
        return rows, np.where(place >= 0, row_of[id_U[place]] if len(id_U) else -1, -1)

    def in_memory(self) -> UserTable:
        """All of them that have events."""
        rows, row_of = self.find(self.keys)
        found = np.flatnonzero(row_of >= 0)
        return UserTable(self.keys.take(pa.array(found)), rows.take(row_of[found]))

    def _rows(self, table: pa.Table) -> Rows:
        """One row for each user of a shard's table. Context features are those of the last event that was chosen."""
        rows = UserRows(table)
        item = pa.array(rows.item.astype(np.int32))
        counts = np.diff(rows.offsets)
        columns: dict[str, pa.Array] = {}
        for name, feature in self._features.items():
            if feature.role == "user":
                columns[name] = table[name].combine_chunks()
                continue
            missing = encoded(feature, [None])
            values = pa.concat_arrays([_arrow(rows.context[feature.name]).cast(missing.type), missing])
            columns[name] = values.take(pa.array(np.where(counts > 0, rows.offsets[1:] - 1, len(values) - 1)))
        history = pa.ListArray.from_arrays(pa.array(rows.offsets.astype(np.int32)), item)
        return Rows(pa.array(rows.user.astype(np.int32)), history, columns)


def known_features(dataset: PreparedDataset) -> dict[str, Feature]:
    """The user and context features by column, with the values that the model knows."""
    found = {}
    for one in dataset.record.features:
        if one.role != "item":
            known = None if one.vocabulary is None else one.vocabulary[: one.cardinality - NUM_RESERVED]
            found[one.column] = one.model_copy(update={"vocabulary": known, "new_values": 0})
    return found


def strangers(columns: Mapping[str, Feature], number: int) -> Rows:
    """Rows of users of whom nothing is known."""
    histories = pa.array([[]] * number, pa.list_(pa.int32()))
    missing = {name: encoded(feature, [None] * number) for name, feature in columns.items()}
    # PAD, whose vector is 0: that of UNKNOWN was drawn, and never trained where all training users have ids.
    return Rows(pa.array(np.full(number, PAD, np.int32)), histories, missing)


class Inputs:
    """Encodes what a model is asked."""

    def __init__(self, items: pa.Array, columns: dict[str, Feature], users: Users, history_length: int) -> None:
        """items: (N,) keys by id, of those that the model knows."""
        self.items, self.features, self.users, self._history_length = items, columns, users, history_length
        self._item_index = KeyIndex(items.slice(FIRST_ITEM))

    @staticmethod
    def of(dataset: PreparedDataset, history_length: int, in_memory: bool = False) -> Inputs:
        """in_memory: read all users now."""
        columns = known_features(dataset)
        users = DatasetUsers(dataset, columns)
        items = dataset.items()["item"].combine_chunks()
        return Inputs(items, columns, users.in_memory() if in_memory else users, history_length)

    def item_ids(self, keys: Keys) -> np.ndarray:
        """(B,) int64 ids; UNKNOWN for an item that the model does not know. Raises DataError for keys of another type."""
        place = self._item_index.find(typed(keys, self.items.type, "item"))
        return np.where(place >= 0, place + FIRST_ITEM, UNKNOWN)

    def known_items(self, keys: Keys) -> np.ndarray:
        """As `item_ids`. Raises DataError if the model does not know one of them."""
        ids = self.item_ids(keys)
        if (ids == UNKNOWN).any():
            unknown = [key for key, one in zip(as_list(keys), ids, strict=True) if one == UNKNOWN]
            raise DataError(
                f"the model does not know {len(unknown)} of {len(ids)} items, such as {unknown[0]!r}: only items of the "
                f"training events have vectors"
            )
        return ids

    def of_users(self, keys: Keys) -> tuple[Rows, np.ndarray]:
        """What is known of these users after all events of the dataset, and (B,) which of them are known.

        Unknown users have no vector of their own, no history, and missing features.
        """
        found, row_of = self.users.find(typed(keys, self.users.keys.type, "user"))
        known = row_of >= 0
        if known.all():
            in_order = len(found) == len(row_of) and bool((row_of == np.arange(len(row_of))).all())
            return found if in_order else found.take(row_of), known
        return Rows.concat([self.of_strangers(1), found]).take(row_of + 1), known

    def of_strangers(self, number: int) -> Rows:
        """Rows of users of whom nothing is known."""
        return strangers(self.features, number)

    def with_history(self, rows: Rows, histories: Sequence[Keys]) -> Rows:
        """The rows with these lists of item keys, oldest first, as histories."""
        lengths = [len(one) for one in histories]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        flat = [key for one in histories for key in as_list(one)]
        ids = self.item_ids(flat).astype(np.int32) if flat else np.empty(0, np.int32)
        return replace(rows, history=pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids)))

    def check_names(self, names: Iterable[str], role: str) -> None:
        """Raises DataError for a name that is no feature of this role, "user" or "context"."""
        for name in names:
            if f"{role}_{name}" not in self.features:
                known = sorted(f.name for f in self.features.values() if f.role == role)
                raise DataError(f"the model has no {role} feature {name!r}; it has: {', '.join(known) or 'none'}")

    def with_values(self, rows: Rows, values: Mapping[str, Any], role: str) -> Rows:
        """The rows with these raw values of features: name -> one per row, or one for all. Raises DataError."""
        columns = dict(rows.columns)
        self.check_names(values, role)
        for name, value in values.items():
            feature = self.features[f"{role}_{name}"]
            many = isinstance(value, (list, tuple, np.ndarray, pa.Array, pa.ChunkedArray))
            listed = as_list(value) if many else [value] * len(rows)
            if len(listed) != len(rows):
                raise DataError(f"{role} feature {name!r} has {len(listed)} values for {len(rows)} rows")
            columns[feature.column] = encoded(feature, listed)
        return replace(rows, columns=columns)

    def batch(self, rows: Rows) -> tuple[Batch, Jagged]:
        """Rows as tensors, with the end of their histories; and all that they have chosen."""
        seen = feature_tensor(Column.of(pa.chunked_array([rows.history])))
        assert isinstance(seen, Jagged)
        found = {n: feature_tensor(Column.of(pa.chunked_array([column]))) for n, column in rows.columns.items()}
        by_role = {
            role: {self.features[n].name: one for n, one in found.items() if self.features[n].role == role}
            for role in ("user", "context")
        }
        user = torch.from_numpy(rows.user.to_numpy().astype(np.int64))
        history = seen.last(self._history_length)
        return Batch(user_B=user, history=history, user_features=by_role["user"], context=by_role["context"]), seen


def encoded(feature: Feature, values: list[Any]) -> pa.Array:
    """Raw values as in training; missing where a value is None. Raises DataError for values of another type."""
    try:
        column = pa.array(values, None if any(one is not None for one in values) else raw_type(feature))
        if feature.kind == "list" and not pa.types.is_list(column.type):
            raise DataError("no lists")
        return features.encode(pa.chunked_array([column]), feature)
    except (*_NOT_OF_TYPE, DataError) as error:
        example = next(one for one in values if one is not None)
        raise DataError(
            f"{feature.role} feature {feature.name!r} has values of type {raw_type(feature)}, and {example!r} is none"
        ) from error


def raw_type(feature: Feature) -> pa.DataType:
    """The type of a feature's raw values."""
    if feature.kind == "numeric" or feature.edges is not None:
        return pa.float64()
    kind = pa.int64() if feature.vocabulary and isinstance(feature.vocabulary[0], int) else pa.string()
    return pa.list_(kind) if feature.kind == "list" else kind


def as_table(rows: Any) -> pa.Table:
    """A pyarrow table, a pandas frame or a list of dicts as a table. Raises DataError for anything else."""
    if isinstance(rows, pa.Table):
        return rows
    if isinstance(rows, Sequence) and all(isinstance(row, Mapping) for row in rows):
        names = list(dict.fromkeys(name for row in rows for name in row))
        return pa.table({name: _column(name, [row.get(name) for row in rows]) for name in names})
    if hasattr(rows, "columns"):
        return pa.Table.from_pandas(rows, preserve_index=False)
    raise DataError(f"rows are {type(rows).__name__}: give a pyarrow table, a pandas frame or a list of dicts")


def _column(name: str, values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except _NOT_OF_TYPE as error:
        raise DataError(f"the values of {name!r} are not of one type: {error}") from None


def as_list(keys: Any) -> list[Any]:
    """Keys as Python values."""
    if isinstance(keys, (pa.Array, pa.ChunkedArray)):
        values: list[Any] = keys.to_pylist()
        return values
    return list(keys.tolist()) if isinstance(keys, np.ndarray) else list(keys)


def typed(keys: Keys, kind: pa.DataType, role: str) -> pa.Array:
    """Keys of the dataset's type. Raises DataError if they are of another one, or null."""
    if isinstance(keys, str):
        raise DataError(f"{role} keys are the text {keys!r}: give a list of keys")
    try:
        found = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else pa.array(as_list(keys))
        found = found.cast(kind) if pa.types.is_integer(found.type) == pa.types.is_integer(kind) else None
    except _NOT_OF_TYPE:
        found = None
    if found is None and len(keys):
        raise DataError(f"{role} keys of the dataset are {kind}, and {as_list(keys)[0]!r} is not: convert them")
    found = pa.array([], kind) if found is None else found
    if found.null_count:
        raise DataError(f"{found.null_count} of {len(found)} {role} keys are null")
    return found


def _arrow(column: Column) -> pa.Array:
    if column.offsets is None:
        return pa.array(column.values)
    return pa.ListArray.from_arrays(pa.array(column.offsets.astype(np.int32)), pa.array(column.values))
