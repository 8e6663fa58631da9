"""What every source hands to prepare: the log in standard columns, and how columns become standard.

Standard columns of `Source.events`:

    user      int64 | string
    item      int64 | string
    time      int64       microseconds since the epoch, or a position when has_time is False
    order     int64       unique; breaks ties of time the same way on every run
    label     float32     optional, 0 or 1
    weight    float32     optional, finite and >= 0
    split     string      optional: "train", "valid", "test"
    context_<name>  int64 | float64 | string | timestamp[us] | lists of the first three, of data.columns.context

The prefix keeps the names of a user's columns apart from these, whatever they are; side tables have `item_<name>` and
`user_<name>` for the same reason (recray.records.feature_column).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray import storage
from recray.errors import DataError
from recray.ids import SPLITS
from recray.records import feature_column

if TYPE_CHECKING:
    import ray.data

STANDARD = ("user", "item", "time", "order", "label", "weight", "split")
FIRST_YEAR, LAST_YEAR = 1990, 2100  # a timestamp outside of these is taken to be in another unit
_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_YEAR_SECONDS = 365.2425 * 86_400


@dataclass(frozen=True)
class Source:
    events: ray.data.Dataset
    num_events: int  # before any filter; exact or a close estimate
    fingerprint: str  # changes when the input does
    has_time: bool = True
    items: pa.Table | None = None  # column `item` and features `item_<name>`, of any type
    users: pa.Table | None = None  # column `user` and features `user_<name>`
    types: dict[str, pa.DataType] | None = None  # of the columns of events, if known before events are read


def decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Without dictionary encoding."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def standard_type(kind: pa.DataType) -> pa.DataType | None:
    """int64, float64, string or a list of these; None for what no column may be (structs, maps, times)."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = standard_type(kind.value_type)
        return None if inner is None or pa.types.is_list(inner) else pa.list_(pa.field("element", inner))
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return pa.int64()
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return pa.float64()
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        return pa.string()
    return pa.null() if pa.types.is_null(kind) else None


def standardised(column: pa.ChunkedArray, kind: pa.DataType, where: str) -> pa.ChunkedArray:
    """`column` as the standard type `kind`. Raises DataError where a value does not fit."""
    try:
        # Times of other units are cut to microseconds.
        return decoded(column).cast(kind, safe=not pa.types.is_timestamp(kind))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{where} holds values that are not {kind}: {error}; fix the column") from error


def ids(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """User or item keys as int64 or string; a null is an error."""
    if column.null_count:
        raise DataError(f"{where} has {column.null_count} null ids in {len(column)} rows; drop or fill these rows")
    kind = standard_type(column.type)
    if kind not in (pa.int64(), pa.string()):
        raise DataError(f"{where} is {column.type}: ids must be integers or strings; convert the column")
    return standardised(column, kind, where)


def finite(column: pa.ChunkedArray, role: str, where: str) -> pa.ChunkedArray:
    """A label (0 or 1) or a weight (>= 0) as float32."""
    values = standardised(column, pa.float32(), where)
    bad = int(values.null_count + pc.sum(pc.invert(pc.is_finite(values.drop_null()))).as_py() if len(values) else 0)
    if bad:
        raise DataError(
            f"{where} has {bad} values in {len(values)} rows that are null, NaN or infinite; fill or drop these rows"
        )
    least, most = low_high(values)
    if role == "label" and not pc.all(pc.is_in(values, pa.array([0, 1], pa.float32()))).as_py() and len(values):
        raise DataError(
            f"{where} holds values from {least:g} to {most:g}: a label is 0 or 1; "
            f"convert it, or use it as data.columns.weight"
        )
    if role == "weight" and least < 0:
        raise DataError(f"{where} holds {least:g}: a weight must be >= 0; shift or drop these rows")
    return values


def splits(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """The names of splits as strings."""
    names = standardised(column, pa.string(), where)
    odd = [str(name) for name in pc.unique(names).to_pylist() if name not in SPLITS]
    if odd:
        raise DataError(f"{where} holds '{odd[0]}': a split is named {', '.join(SPLITS)}; rename these values")
    return names


def microseconds(column: pa.ChunkedArray, unit: str, where: str) -> pa.Array:
    """Timestamps as int64 microseconds since the epoch (unit 's', 'ms', 'us', 'ns'), or as they are ('order').

    Raises DataError on nulls and on values that the unit puts outside of FIRST_YEAR .. LAST_YEAR.
    """
    column = decoded(column)
    if column.null_count:
        raise DataError(_null_times(column, where))
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        values = column.cast(pa.timestamp("us"), safe=False).cast(pa.int64()).combine_chunks()
        _check_years(values, "us", where)
        return values
    if pa.types.is_floating(column.type) and len(column) and not pc.all(pc.is_finite(column)).as_py():
        raise DataError(f"{where} has NaN or infinite timestamps; drop or fill these rows")
    if unit == "order":
        return standardised(column, pa.int64(), where).combine_chunks()
    _check_years(column, unit, where)
    values = column.to_numpy() if isinstance(column, pa.ChunkedArray) else column.to_numpy(zero_copy_only=False)
    if pa.types.is_floating(column.type):
        return pa.array(np.rint(values.astype(np.float64) * (1e6 / _PER_SECOND[unit])).astype(np.int64))
    values = values.astype(np.int64)
    return pa.array(values // 1000 if unit == "ns" else values * (1_000_000 // _PER_SECOND[unit]))


def infer_unit(column: pa.ChunkedArray, where: str) -> str:
    """The unit that puts the middle value into FIRST_YEAR .. LAST_YEAR. The four ranges do not overlap."""
    column = decoded(column)
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        return "us"
    values = column.drop_null().to_numpy()
    values = values[np.isfinite(values)]
    if not len(values):
        raise DataError(_null_times(column, where))
    middle = float(np.median(values))
    fits = [unit for unit in _PER_SECOND if FIRST_YEAR <= _year(middle, unit) < LAST_YEAR]
    if not fits:
        raise DataError(_wrong_unit(middle, where, None))
    return fits[0]


def _null_times(column: pa.ChunkedArray, where: str) -> str:
    return f"{where} has {column.null_count} null timestamps in {len(column)} rows; drop or fill these rows"


def _year(value: float, unit: str) -> float:
    return 1970 + value / _PER_SECOND[unit] / _YEAR_SECONDS


def _check_years(column: pa.ChunkedArray, unit: str, where: str) -> None:
    if not len(column):
        return
    for value in low_high(column):
        if not FIRST_YEAR <= _year(value, unit) < LAST_YEAR:
            raise DataError(_wrong_unit(value, where, unit))


def _wrong_unit(value: float, where: str, unit: str | None) -> str:
    meanings = ", ".join(f"{name}: the year {_year(value, name):.0f}" for name in _PER_SECOND)
    judged = "in no unit" if unit is None else f"not in the unit '{unit}'"
    return (
        f"timestamp in the wrong unit: {where} holds {value:.0f}, which is {judged} between {FIRST_YEAR} and "
        f"{LAST_YEAR} ({meanings}); set data.timestamp_unit to s, ms, us or ns, "
        f"or to 'order' if it is a position and not a time; or drop these rows"
    )


def low_high(column: pa.ChunkedArray) -> tuple[float, float]:
    """Least and greatest value; (0, 0) of nothing."""
    both = pc.min_max(column)
    return float(both["min"].as_py() or 0), float(both["max"].as_py() or 0)


def did_you_mean(name: str, there: Iterable[str]) -> str:
    """' (did you mean ...?)' with the most similar name, whatever its case; '' if there is none."""
    by_case = {one.casefold(): one for one in there}
    near = difflib.get_close_matches(name.casefold(), by_case, n=1, cutoff=0.4)
    return f" (did you mean {by_case[near[0]]!r}?)" if near else ""


def unique_names(names: Sequence[str], wanted: Iterable[str], where: str) -> None:
    """Raises DataError if one of the wanted columns is there twice."""
    for name in wanted:
        if (count := names.count(name)) > 1:
            raise DataError(
                f"{where} has {count} columns called {name!r}, and only one can be meant; rename the others"
            )


def side_table(uri: str | None, key: str, role: Literal["item", "user"]) -> pa.Table | None:
    """An item or user table with its key column renamed to `role`; one row per key."""
    if uri is None:
        return None
    tables = [storage.read_table(info.uri) for info in storage.list_files(uri)]
    return keyed_table(pa.concat_tables(tables, promote_options="permissive"), key, role, uri)


def keyed_table(table: pa.Table, key: str, role: Literal["item", "user"], where: str) -> pa.Table:
    """`table` with its unique key first, called `role`, and the other columns, which are not converted, as features."""
    names = table.column_names
    if key not in names:
        raise DataError(
            f"{where} has no column '{key}' to join on{did_you_mean(key, names)}; columns there: {', '.join(names)}; "
            f"rename its key to data.columns.{role}"
        )
    unique_names(names, names, where)
    keys = ids(table[key], f"{where}: column '{key}'")
    counts = pc.value_counts(keys.combine_chunks())
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        raise DataError(
            f"{where}: column '{key}' repeats {len(repeated)} of {len(counts)} keys, '{repeated[0]['values']}' "
            f"{repeated[0]['counts']} times; keep one row per {role}"
        )
    return pa.table({role: keys} | {feature_column(role, name): table[name] for name in names if name != key})
