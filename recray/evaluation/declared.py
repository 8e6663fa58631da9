"""Groups by declared features of users and items (`evaluation.slices`), from the raw values of the side tables.

For text, and for whole numbers with few distinct values, each of the most frequent values is a group. Other numbers are split
at their quartiles. For lists, each frequent value is a group, and the groups overlap. Missing values form one more group.

Shape legend: N users or items by id.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.data.sources import files, tables
from recray.errors import ConfigError
from recray.evaluation.slices import of_group
from recray.ids import FIRST_ITEM
from recray.records import Feature, Slice

_MOST = 10  # values that have groups of their own
MISSING, OTHERS = "missing", "other values"


@dataclass(frozen=True)
class Declared:
    """A feature and its groups."""

    role: str  # "user" or "item"
    by: str  # "user country"
    groups: list[tuple[str, np.ndarray]]  # (name, (N,) whether each user or item is in the group)


def check(config: Config, features: Sequence[Feature]) -> None:
    """Raises ConfigError if a name of `evaluation.slices` is no feature of users or items."""
    there = sorted({one.name for one in features if one.role in ("user", "item")})
    for name in config.evaluation.slices:
        if name not in there:
            raise ConfigError(
                f"evaluation.slices names '{name}', which is no feature of users or items; there are: {', '.join(there) or 'none'}"
            )


def read(config: Config, dataset: PreparedDataset) -> list[Declared]:
    """The features of `evaluation.slices`. Raises as `check`, StorageError if the side table is gone."""
    check(config, dataset.record.features)
    found = []
    for name in config.evaluation.slices:
        for role in ("user", "item"):
            if any(one.name == name and one.role == role for one in dataset.record.features):
                column = _column(config, dataset, role, name)
                found.append(Declared(role, f"{role} {name}", list(_groups(column))))
    return found


def of_lists(
    features: Sequence[Declared],
    columns: Mapping[str, np.ndarray],
    user_B: np.ndarray,
    hit: Mapping[str, np.ndarray],
    item_T: np.ndarray,
    user_T: np.ndarray,
    config: Config,
    metric: str,
    sign: int,
) -> list[Slice]:
    """By features of users the metric of queries, by features of items the share of targets that are found. Arguments as of
    recray.evaluation.slices."""
    found = {name: one.astype(np.float64) for name, one in hit.items()}
    known, at_k = item_T >= FIRST_ITEM, f"found@{metric.rpartition('@')[2]}"
    made = []
    for feature in features:
        for group, mask_N in feature.groups:
            if feature.role == "user":
                mask = mask_N[user_B]
                made += [of_group(feature.by, group, metric, columns, mask, user_B, config, sign)] if mask.any() else []
            else:
                mask = known & mask_N[item_T]
                made += [of_group(feature.by, group, at_k, found, mask, user_T, config, 1)] if mask.any() else []
    return made


def _column(config: Config, dataset: PreparedDataset, role: str, name: str) -> pa.Array:
    """(N,) raw values by id; null where the side table has no such user or item."""
    uri, names = (
        (config.data.users, config.data.columns.user)
        if role == "user"
        else (config.data.items, config.data.columns.item)
    )
    assert uri is not None  # or there was no such feature
    keys = _user_keys(dataset) if role == "user" else dataset.items()["item"].combine_chunks()
    footers = tables.read_footers(files.find(uri, "evaluate"))
    return tables.by_key(footers, names, [name], keys)[name].combine_chunks()


def _user_keys(dataset: PreparedDataset) -> pa.Array:
    table = dataset.user_keys()
    ids = table["user_id"].to_numpy()
    place = np.full(int(ids.max(initial=0)) + 1, -1)
    place[ids] = np.arange(len(ids))
    return table["user"].combine_chunks().take(pa.array(place, mask=place < 0))


def _groups(column: pa.Array) -> Iterator[tuple[str, np.ndarray]]:
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        yield from _of_lists(column)
        return
    missing = np.asarray(column.is_null(nan_is_null=True).to_numpy(zero_copy_only=False))
    numbers = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    if numbers and len(pc.unique(column.drop_null())) > _MOST:
        values = np.asarray(pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False))
        edges = np.unique(np.quantile(values[~missing], [0.25, 0.5, 0.75]))
        part = np.searchsorted(edges, values, side="right")
        for at in range(len(edges) + 1):
            low, high = (f"{edges[n]:,.4g}" if 0 <= n < len(edges) else "" for n in (at - 1, at))
            name = f"{low} to {high}" if low and high else f"below {high}" if high else f"{low} and more"
            yield name, (part == at) & ~missing
    else:
        yield from _of_values(column, missing)
    if missing.any():
        yield MISSING, missing


def _of_values(column: pa.Array, missing: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    left = ~missing
    for value in _frequent(column.drop_null()):
        mask = np.asarray(pc.fill_null(pc.equal(column, value), False).to_numpy(zero_copy_only=False)) & ~missing
        left &= ~mask
        yield str(value), mask
    if left.any():
        yield OTHERS, left


def _of_lists(column: pa.Array) -> Iterator[tuple[str, np.ndarray]]:
    flat, row = pc.list_flatten(column), pc.list_parent_indices(column).to_numpy()
    some = np.zeros(len(column), bool)
    some[row] = True
    left = some.copy()
    for value in _frequent(flat.drop_null()):
        mask = np.zeros(len(column), bool)
        mask[row[np.asarray(pc.fill_null(pc.equal(flat, value), False).to_numpy(zero_copy_only=False))]] = True
        left &= ~mask
        yield str(value), mask
    if left.any():
        yield OTHERS, left
    if not some.all():
        yield MISSING, ~some


def _frequent(values: pa.Array) -> list[pa.Scalar]:
    """The most frequent values, ties by value."""
    counts = pc.value_counts(values)
    if not len(counts):
        return []
    table = pa.table({"value": counts.field(0), "count": counts.field(1)})
    order = pc.sort_indices(table, sort_keys=[("count", "descending"), ("value", "ascending")])
    return list(table["value"].take(order[:_MOST]))
