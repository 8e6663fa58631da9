"""Encoding of feature columns as numbers: fitted once on the train events, applied in every task.

categorical, list   int32 ids: 0 missing, 1 unknown (rarer than min_count or never seen), 2.. by falling count, ties by value,
                    then in the same order the values that the validation split adds, for a refit;
                    nulls inside lists are dropped, so that [a, null] is [a]
                    hashed: 0 missing, 2 + hash of the value modulo hash_buckets; nothing is unknown
numeric             float32, (x - mean) / std with both from the fitted data, cut off at +-10; null, NaN and infinite
                    become 0, the mean
                    log: the same of sign(x) log(1 + |x|)
                    quantiles: int32 ids, 0 missing (null, NaN, infinite), 2 + number of fitted edges <= x
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray import log
from recray.config import FeatureConfig
from recray.data.hashing import hash_keys
from recray.ids import NUM_RESERVED, PAD, UNKNOWN
from recray.loading.jagged import offsets_from_lengths
from recray.records import Feature, Role

_MAX_POINTS = 4096  # weighted points that stand for the distribution of a numeric column
_SENTINEL_SHARE, _SENTINEL_DISTANCE = 0.005, 5.0  # of the rows; standard deviations
LARGEST = 10.0  # standard deviations; one absurd value must not overflow a model that multiplies its inputs


def count_values(column: pa.ChunkedArray, config: FeatureConfig) -> pa.Table:
    """Statistics of some rows, for `fit`: (value, n) for categories and quantiles; (n, mean, squares) for other numbers,
    and the least and the greatest with how often they occur, for `sentinel`.

    A hashed category counts its bucket. squares: sum of squared distances from the mean, which does not cancel as a
    sum of squares would.
    """
    if config.kind == "numeric":
        x = _numbers(column)
        good = x[np.isfinite(x)]
        if config.scale == "quantiles":
            return _thinned(value_counts(pa.chunked_array([pa.array(good)])))
        if config.scale == "log":
            good = _log(good)
        if not len(good):
            return _moments(0, 0.0, 0.0, [0.0, 0.0], [0, 0])
        mean, ends = float(good.mean()), [float(good.min()), float(good.max())]
        squares = float(((good - mean) ** 2).sum())
        return _moments(len(good), mean, squares, ends, [int((good == end).sum()) for end in ends])
    entries = _entries(column)
    if config.hash_buckets:
        entries = pa.chunked_array([_hash(entries.combine_chunks().drop_null(), config.hash_buckets)])
    return value_counts(entries)


def value_counts(column: pa.ChunkedArray) -> pa.Table:
    """Columns value and n; nulls are not counted."""
    counts = pc.value_counts(column.drop_null())
    return pa.table({"value": counts.field("values"), "n": counts.field("counts")})


def merge(*parts: pa.Table) -> pa.Table:
    """Combine results of `count_values`. The order of parts decides the last bits of a float."""
    table = pa.concat_tables(parts)
    if "value" in table.column_names:
        numbers = [name for name in table.column_names if name != "value"]
        summed = table.group_by("value", use_threads=False).aggregate([(name, "sum") for name in numbers])
        return _thinned(pa.table({"value": summed["value"], **{name: summed[f"{name}_sum"] for name in numbers}}))
    n, mean, squares = 0.0, 0.0, 0.0
    rows = table.to_pylist()  # one per part
    for row in rows:  # Chan et al. 1979
        total = n + row["n"]
        step = row["mean"] - mean
        if total:
            squares += row["squares"] + step * step * n * row["n"] / total
            mean += step * row["n"] / total
        n = total
    full = [row for row in rows if row["n"]] or rows
    ends = [pick(row["ends"][i] for row in full) for i, pick in enumerate((min, max))]
    often = [sum(row["often"][i] for row in full if row["ends"][i] == end) for i, end in enumerate(ends)]
    return _moments(int(n), mean, squares, ends, often)


def sentinel(feature: Feature, counts: pa.Table) -> str | None:
    """A word on a number that is so frequent and so far from the others that it may stand for a missing value, as -999 does."""
    row = counts.to_pylist()[0]
    for end, times in zip(row["ends"], row["often"], strict=True):
        rest = row["n"] - times
        if times > rest or times < max(
            2, _SENTINEL_SHARE * row["n"]
        ):  # of most rows it is the usual value, as 0 often is
            continue
        mean = row["mean"] + (row["mean"] - end) * times / rest  # of the others
        squares = row["squares"] - (end - row["mean"]) ** 2 * times * row["n"] / rest
        std = float(np.sqrt(max(squares, 0.0) / rest))
        # Others that are all equal are no distribution to be far from; rounding leaves them a tiny spread.
        if 1e-6 * abs(end - mean) < std < abs(end - mean) / _SENTINEL_DISTANCE:
            value = np.sign(end) * np.expm1(abs(end)) if feature.log else end
            return (
                f"{feature.role} feature {feature.name!r}: {times:,.0f} of {row['n']:,.0f} values are {value:.15g}, "
                f"{abs(end - mean) / std:.0f} standard deviations from the others; if it stands for a missing value, "
                f"write null"
            )
    return None


def fit(name: str, role: Role, config: FeatureConfig, counts: pa.Table, added: pa.Table | None = None) -> Feature:
    """Fit a feature to the statistics of all rows.

    added: statistics of the rows that a refit adds. Its vocabulary grows by their values; numbers are scaled as before.
    """
    if config.kind == "numeric" and config.scale == "quantiles":
        edges = _edges(counts, config.quantiles)
        return Feature(name=name, role=role, kind="categorical", cardinality=NUM_RESERVED + len(edges) + 1, edges=edges)
    if config.kind == "numeric":
        row = counts.to_pylist()[0]
        std = float(np.sqrt(row["squares"] / max(row["n"], 1)))
        std = std if std > 1e-12 else 1.0
        feature = Feature(name=name, role=role, kind="numeric", mean=row["mean"], std=std, log=config.scale == "log")
        if text := sentinel(feature, counts):
            log.warning("prepare", text)
        return feature
    if config.hash_buckets:
        return Feature(
            name=name,
            role=role,
            kind=config.kind,
            cardinality=NUM_RESERVED + config.hash_buckets,
            hash_buckets=config.hash_buckets,
            collisions=_collisions(len(counts), config.hash_buckets),
        )
    vocabulary = _frequent(counts, config.min_count)
    both = _frequent(merge(counts, added), config.min_count) if added is not None else vocabulary
    known = set(vocabulary)
    new = [value for value in both if value not in known]
    return Feature(
        name=name,
        role=role,
        kind=config.kind,
        cardinality=NUM_RESERVED + len(vocabulary),
        new_values=len(new),
        vocabulary=vocabulary + new,
    )


def _frequent(counts: pa.Table, min_count: int) -> list[Any]:
    kept = counts.filter(pc.greater_equal(counts["n"], min_count))
    values: list[Any] = kept.sort_by([("n", "descending"), ("value", "ascending")])["value"].to_pylist()
    return values


def encode(column: pa.ChunkedArray, feature: Feature) -> pa.Array:
    """The column as int32, list<int32> or float32."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if feature.edges is not None:
        x = _numbers(column)
        return pa.array(
            np.where(np.isfinite(x), NUM_RESERVED + np.searchsorted(feature.edges, x, side="right"), PAD).astype(
                np.int32
            )
        )
    if feature.kind == "numeric":
        x = _numbers(column)
        x = _log(x) if feature.log else x
        scaled = np.clip((x - feature.mean) / feature.std, -LARGEST, LARGEST)
        return pa.array(np.where(np.isfinite(x), scaled, 0.0).astype(np.float32))
    if feature.kind == "categorical":
        return _lookup(column, feature)
    if pa.types.is_null(column.type) or not _is_list(column.type):  # nulls only
        return pa.array([[]] * len(column), pa.list_(pa.int32()))
    values = _no_nan(pc.list_flatten(column))
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    # Without the nulls a list ends where as many entries that are not null end.
    kept = offsets_from_lengths(values.is_valid().to_numpy(zero_copy_only=False))
    offsets = kept[offsets_from_lengths(lengths)].astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), _lookup(values.drop_null(), feature))


def _lookup(values: pa.Array, feature: Feature) -> pa.Array:
    values = _no_nan(values)
    if feature.hash_buckets:
        return pc.fill_null(pc.add(_hash(values, feature.hash_buckets), NUM_RESERVED), PAD).cast(pa.int32())
    vocabulary = pa.array(feature.vocabulary or [], type=_vocabulary_type(values.type))
    found = pc.index_in(values.cast(vocabulary.type), value_set=vocabulary)
    ids = pc.add(pc.fill_null(found, UNKNOWN - NUM_RESERVED), NUM_RESERVED).to_numpy(zero_copy_only=False)
    ids = np.where(values.is_null().to_numpy(zero_copy_only=False), PAD, ids)
    return pa.array(ids.astype(np.int32))


def _vocabulary_type(kind: pa.DataType) -> pa.DataType:
    return pa.int64() if pa.types.is_integer(kind) or pa.types.is_boolean(kind) else pa.string()


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _moments(n: int, mean: float, squares: float, ends: list[float], often: list[int]) -> pa.Table:
    return pa.table({"n": [float(n)], "mean": [mean], "squares": [squares], "ends": [ends], "often": [often]})


def _entries(column: pa.ChunkedArray) -> pa.ChunkedArray:
    flat = pc.list_flatten(column) if _is_list(column.type) else column
    return _no_nan(flat).cast(_vocabulary_type(flat.type))


def _no_nan(values: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_floating(values.type):
        return values
    return pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """Float64; dates and times as microseconds since 1970."""
    column = column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)


def _log(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.sign(x) * np.log1p(np.abs(x)))


def _hash(values: pa.Array, buckets: int) -> pa.Array:
    """int64 bucket of each value, null where it is null. Each distinct value is hashed once."""
    encoded = values.cast(_vocabulary_type(values.type)).dictionary_encode()
    bucket_V = hash_keys(encoded.dictionary) % np.uint64(buckets)
    return pa.array(bucket_V.astype(np.int64)).take(encoded.indices)


def _collisions(occupied: int, buckets: int) -> float:
    """Share of distinct values that share their bucket, from how many buckets are occupied (linear counting, Whang et al. 1990)."""
    if occupied >= buckets:
        return 1.0
    values = -buckets * np.log1p(-occupied / buckets)
    return float(1 - (1 - 1 / buckets) ** max(values - 1, 0))


def _thinned(points: pa.Table) -> pa.Table:
    """Reduce counts of numbers to at most _MAX_POINTS points of equal weight; other counts are returned unchanged."""
    if not pa.types.is_floating(points["value"].type) or len(points) <= _MAX_POINTS:
        return points
    points = points.sort_by("value")
    x, total = points["value"].to_numpy(), np.cumsum(points["n"].to_numpy())
    place = (np.arange(1, _MAX_POINTS + 1) * total[-1]) // _MAX_POINTS
    at = x[np.searchsorted(total, place)]
    starts = np.flatnonzero(np.diff(at, prepend=np.nan))
    return pa.table({"value": at[starts], "n": np.add.reduceat(np.diff(place, prepend=0), starts)})


def _edges(points: pa.Table, quantiles: int) -> list[float]:
    """Distinct inner quantiles; empty if all values are equal."""
    if not len(points):
        return []
    points = points.sort_by("value")
    x, total = points["value"].to_numpy(), np.cumsum(points["n"].to_numpy())
    inner = x[np.searchsorted(total, np.arange(1, quantiles) * total[-1] / quantiles, side="right")]
    return [float(edge) for edge in inner[np.diff(inner, prepend=x[0]) > 0]]
