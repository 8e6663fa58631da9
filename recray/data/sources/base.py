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

import contextlib
import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray.errors import DataError
from recray.ids import SPLITS
from recray.records import InputFile, feature_column

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
    inputs: Sequence[InputFile] = ()  # what it reads, for the record
    files: Sequence[InputFile] = ()  # the files of the log in the order of their events, where `since` can be asked
    since: Callable[[int], tuple[ray.data.Dataset | None, int]] | None = (
        None  # events of files[n:] (None: of no file) and their number
    )


def decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Without dictionary encoding; extension types as what they are stored as, and bytes of a fixed width as text.

    16 bytes are written as UUIDs are, others in hexadecimal digits.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if isinstance(column.type, pa.BaseExtensionType):
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
    if pa.types.is_fixed_size_binary(column.type):
        encoded = column.combine_chunks().dictionary_encode()
        texts = [None if value is None else value.hex() for value in encoded.dictionary.to_pylist()]
        if column.type.byte_width == 16:
            texts = [t and f"{t[:8]}-{t[8:12]}-{t[12:16]}-{t[16:20]}-{t[20:]}" for t in texts]
        return pa.chunked_array([pa.array(texts, pa.string()).take(encoded.indices)])
    if pa.types.is_decimal(column.type) and column.type.bit_width < 128:  # pyarrow 26 casts what lies under nulls
        return column.cast(pa.decimal128(column.type.precision, column.type.scale))
    return column


def is_time(kind: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind))


def standard_type(kind: pa.DataType) -> pa.DataType | None:
    """int64, float64, string or a list of these; None for what no column may be (structs, maps, times).

    A decimal without digits after the point is an integer, as databases write those.
    """
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if _is_list(kind):
        inner = standard_type(kind.value_type)
        plain = inner is not None and not pa.types.is_list(inner) and not _is_bytes(kind.value_type)
        return pa.list_(pa.field("element", inner)) if plain else None
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or (pa.types.is_decimal(kind) and kind.scale == 0):
        return pa.int64()
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return pa.float64()
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or _is_bytes(kind):
        return pa.string()
    return pa.null() if pa.types.is_null(kind) else None


def _is_list(kind: pa.DataType) -> bool:
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)
    return any(test(kind) for test in (*tests, pa.types.is_large_list_view))


def _is_bytes(kind: pa.DataType) -> bool:
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(test(kind) for test in tests)


def standardised(column: pa.ChunkedArray, kind: pa.DataType, where: str) -> pa.ChunkedArray:
    """`column` as the standard type `kind`. Raises DataError where a value does not fit."""
    if column.null_count == len(column):
        return pa.chunked_array([pa.nulls(len(column), kind)])
    try:
        # Times of other units are cut to microseconds, and large integers rounded to floats.
        return decoded(column).cast(kind, safe=not (is_time(kind) or pa.types.is_floating(kind)))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        reason = "bytes that are not UTF-8 text" if "UTF8" in str(error) else f"values that are not {kind}: {error}"
        raise DataError(f"{where} holds {reason}; fix the column") from error


def ids(column: pa.ChunkedArray, where: str, kind: pa.DataType | None = None) -> pa.ChunkedArray:
    """User or item keys as int64 or string; floats and decimals must be whole numbers, and a null is an error.

    kind: that of all files, if it is known.
    """
    if column.null_count:
        raise DataError(f"{where} has {column.null_count} null ids in {len(column)} rows; drop or fill these rows")
    own = standard_type(column.type)
    if own not in (pa.int64(), pa.float64(), pa.string()):
        raise DataError(f"{where} is {column.type}: ids must be integers or strings; convert the column")
    # pandas makes floats of integers with missing values, and NaN of these.
    missing = int(pc.sum(pc.is_nan(column)).as_py() or 0) if pa.types.is_floating(column.type) else 0
    if missing:
        raise DataError(f"{where} has {missing} NaN ids in {len(column)} rows; drop or fill these rows")
    if pa.types.is_floating(column.type) and len(column) and max(map(abs, low_high(column))) > 2**53:
        raise DataError(f"{where} is {column.type}, which rounds integers above 2^53; write ids as integers or strings")
    return standardised(column, kind or (pa.string() if own == pa.string() else pa.int64()), where)


def finite(column: pa.ChunkedArray, role: str, where: str) -> pa.ChunkedArray:
    """A label (0 or 1) or a weight (>= 0) as float32."""
    values = standardised(column, pa.float32(), where)
    bad = values.null_count + (pc.sum(pc.invert(pc.is_finite(values.drop_null()))).as_py() or 0)
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

    Text is read as ISO 8601, and times without a zone as UTC. Raises DataError on nulls and on values outside of
    FIRST_YEAR .. LAST_YEAR.
    """
    column = _times(column, where)
    if column.null_count:
        raise DataError(_null_times(column, where))
    if is_time(column.type):
        # Nanoseconds are cut to microseconds; seconds may not fit.
        finer = pa.types.is_timestamp(column.type) and column.type.unit == "ns"
        try:
            values = column.cast(pa.timestamp("us"), safe=not finer).cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise DataError(f"{where} holds times that are no dates: {error}; drop or fill these rows") from error
        _check_years(values, "us", where, typed=True)
        return values.combine_chunks()
    if pa.types.is_floating(column.type) and len(column) and not pc.all(pc.is_finite(column)).as_py():
        raise DataError(f"{where} has NaN or infinite timestamps; drop or fill these rows")
    if unit == "order":
        return standardised(column, pa.int64(), where).combine_chunks()
    _check_years(column, unit, where)
    values = column.to_numpy()
    if pa.types.is_floating(column.type):
        return pa.array(np.rint(values.astype(np.float64) * (1e6 / _PER_SECOND[unit])).astype(np.int64))
    values = values.astype(np.int64)
    return pa.array(values // 1000 if unit == "ns" else values * (1_000_000 // _PER_SECOND[unit]))


def infer_unit(column: pa.ChunkedArray, where: str) -> str:
    """The unit that puts the middle value into FIRST_YEAR .. LAST_YEAR. The four ranges do not overlap."""
    column = _times(column, where)
    if is_time(column.type):
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


def _times(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """As timestamps, dates, int64 or float64."""
    column = decoded(column)
    kind = standard_type(column.type)
    if is_time(column.type) or column.null_count == len(column):
        return column.cast(pa.int64()) if pa.types.is_null(column.type) else column
    if kind not in (pa.int64(), pa.float64(), pa.string()):
        raise DataError(f"{where} is {column.type}: times are timestamps, dates, numbers or ISO 8601 text; convert it")
    if kind != pa.string():
        return standardised(column, kind, where)
    text = standardised(column, kind, where)
    for parsed in (pa.timestamp("us"), pa.timestamp("us", "UTC"), pa.timestamp("ns"), pa.timestamp("ns", "UTC")):
        with contextlib.suppress(pa.ArrowInvalid):
            return text.cast(parsed)
    raise DataError(
        f"{where} holds text such as '{text.drop_null()[0]}', and not only ISO 8601 times (2024-01-31, 2024-01-31 10:00:00 "
        f"or 2024-01-31T10:00:00Z, in one form); write it as a timestamp type"
    )


def _null_times(column: pa.ChunkedArray, where: str) -> str:
    return f"{where} has {column.null_count} null timestamps in {len(column)} rows; drop or fill these rows"


def _year(value: Any, unit: str) -> Any:
    """Of a number or an array of numbers."""
    return 1970 + value / _PER_SECOND[unit] / _YEAR_SECONDS


def _check_years(column: pa.ChunkedArray, unit: str, where: str, typed: bool = False) -> None:
    """Raises DataError on values outside of the years: a wrong unit if most are, else a placeholder for 'no time'."""
    if not len(column) or all(FIRST_YEAR <= _year(value, unit) < LAST_YEAR for value in low_high(column)):
        return
    values = column.to_numpy()
    years = _year(values, unit)
    odd = values[(years < FIRST_YEAR) | (years >= LAST_YEAR)]
    if not typed and len(odd) * 2 > len(values):
        raise DataError(_wrong_unit(float(odd[0]), where, unit))
    shown = _moment(float(odd[0]), unit) if typed else f"{odd[0]:.0f}, which is {_moment(float(odd[0]), unit)},"
    raise DataError(
        f"{where} holds {shown} in {int((odd == odd[0]).sum())} of {len(values)} rows: outside of {FIRST_YEAR} to {LAST_YEAR}, "
        f"and often written for 'no time'; drop or fill these rows"
    )


def _moment(value: float, unit: str) -> str:
    with contextlib.suppress(OverflowError):
        moment = datetime(1970, 1, 1) + timedelta(seconds=value / _PER_SECOND[unit])
        return moment.isoformat(sep=" ", timespec="seconds")
    return f"the year {_year(value, unit):.0f}"


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
