"""Feature columns to numbers: fitted once, applied in every task.

categorical, list   int32 ids: 0 missing, 1 unknown (rarer than min_count or never seen), 2.. by falling count, ties by value
numeric             float32, (x - mean) / std with both from the fitted data; null, NaN and infinite become 0, the mean
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray.config import FeatureConfig
from recray.errors import DataError
from recray.records import Feature

_MAX_INFERRED = 10_000  # distinct values up to which an integer or string column is taken for a category


def infer_kinds(table: pa.Table, key: str, declared: dict[str, FeatureConfig], where: str) -> dict[str, FeatureConfig]:
    """Declared features, or every usable column of a side table when none is declared."""
    if declared:
        missing = [name for name in declared if name not in table.column_names]
        if missing:
            raise DataError(f"{where} has no column '{missing[0]}'; columns there: {', '.join(table.column_names)}")
        return declared
    kinds: dict[str, FeatureConfig] = {}
    for name in table.column_names:
        kind = table[name].type
        if name == key:
            continue
        if _is_list(kind):
            kinds[name] = FeatureConfig(kind="list")
        elif pa.types.is_floating(kind):
            kinds[name] = FeatureConfig(kind="numeric")
        elif (pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)) and (
            len(pc.unique(table[name])) <= min(_MAX_INFERRED, max(2, len(table) // 2))
        ):
            kinds[name] = FeatureConfig(kind="categorical")
    return kinds


def count_values(column: pa.ChunkedArray, config: FeatureConfig) -> pa.Table:
    """What fitting needs of one block: (value, n) for categories; one row (n, sum, squares) for numbers."""
    if config.kind == "numeric":
        x = _numbers(column)
        good = x[np.isfinite(x)]
        return pa.table({"n": [len(good)], "sum": [float(good.sum())], "squares": [float((good * good).sum())]})
    counts = pc.value_counts(_entries(column).drop_null())
    return pa.table({"value": counts.field("values"), "n": counts.field("counts")})


def fit(name: str, role: str, config: FeatureConfig, parts: list[pa.Table]) -> Feature:
    """A feature from the counts of all blocks."""
    table = pa.concat_tables(parts, promote_options="permissive")
    if config.kind == "numeric":
        n, total, squares = (float(pc.sum(table[c]).as_py() or 0) for c in ("n", "sum", "squares"))
        mean = total / max(n, 1)
        std = float(np.sqrt(max(squares / max(n, 1) - mean * mean, 0.0)))
        return Feature(name=name, role=role, kind="numeric", mean=mean, std=std if std > 1e-12 else 1.0)  # type: ignore[arg-type]
    summed = table.group_by("value").aggregate([("n", "sum")])
    kept = summed.filter(pc.greater_equal(summed["n_sum"], config.min_count))
    kept = kept.sort_by([("n_sum", "descending"), ("value", "ascending")])
    vocabulary = kept["value"].to_pylist()
    return Feature(name=name, role=role, kind=config.kind, cardinality=len(vocabulary) + 2, vocabulary=vocabulary)  # type: ignore[arg-type]


def encode(column: pa.ChunkedArray, feature: Feature) -> pa.Array:
    """The column as int32, list<int32> or float32."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if feature.kind == "numeric":
        x = _numbers(column)
        scaled = (x - feature.mean) / feature.std
        return pa.array(np.where(np.isfinite(x), scaled, 0.0).astype(np.float32))
    if feature.kind == "categorical":
        return _lookup(column, feature)
    lists = column.cast(pa.list_(_element(column.type)))
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), _lookup(pc.list_flatten(lists), feature))


def _lookup(values: pa.Array, feature: Feature) -> pa.Array:
    vocabulary = pa.array(feature.vocabulary or [], type=_vocabulary_type(values.type))
    found = pc.index_in(values.cast(vocabulary.type), value_set=vocabulary)
    ids = pc.add(pc.fill_null(found, -1), 2).to_numpy(zero_copy_only=False)
    ids = np.where(values.is_null().to_numpy(zero_copy_only=False), 0, ids)
    return pa.array(ids.astype(np.int32))


def _vocabulary_type(kind: pa.DataType) -> pa.DataType:
    return pa.int64() if pa.types.is_integer(kind) or pa.types.is_boolean(kind) else pa.string()


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _element(kind: pa.DataType) -> pa.DataType:
    return kind.value_type


def _entries(column: pa.ChunkedArray) -> pa.ChunkedArray:
    flat = pc.list_flatten(column) if _is_list(column.type) else column
    return flat.cast(_vocabulary_type(flat.type))


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)
