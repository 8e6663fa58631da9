"""Parquet files read as one table, although their columns may differ: what a column is over all files.

- A file without rows, and a column without values in one file, have no say in the type of a column.
- A folder called key=value is a column, as Hive and Spark write partitions; a column of that name in the file comes first.
  Its values are integers if all are written as integers are (7, and not 007), else strings.
- Numbers of different types are joined: int32 and int64, int and float; so are text types, dictionaries and their values.
- Integers that int64 does not hold (uint64, decimal(38, 0)) are strings, in every file.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recray import log, storage
from recray.data.sources import base
from recray.errors import DataError

Side = Literal["item", "user"]
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
_INTEGER = re.compile(r"0|-?[1-9]\d{0,17}")
_WIDE = pa.uint64()  # stands for integers of which some do not fit int64


@dataclass(frozen=True)
class Footer:
    """What is known of a file before its rows are read."""

    uri: str
    size: int  # bytes
    schema: pa.Schema
    group_rows: list[int]
    group_bytes: list[int]  # before compression
    hive: dict[str, str | None]

    @property
    def rows(self) -> int:
        return sum(self.group_rows)

    @property
    def names(self) -> list[str]:
        """Its columns and partitions."""
        return [*self.schema.names, *(name for name in self.hive if name not in self.schema.names)]


def read_footers(files: Sequence[storage.FileInfo]) -> list[Footer]:
    """Raises DataError or StorageError that names a file that is damaged or cannot be read."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(_read_footer, files))


def _read_footer(info: storage.FileInfo) -> Footer:
    with storage.open_parquet(info.uri) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        rows, sizes = [group.num_rows for group in groups], [group.total_byte_size for group in groups]
        return Footer(info.uri, info.size, file.schema_arrow, rows, sizes, partitions(info.uri))


def partitions(uri: str) -> dict[str, str | None]:
    """The values of the folders key=value of a path; None where Hive writes a null."""
    pairs = [part.split("=", 1) for part in uri.split("/")[:-1] if "=" in part.lstrip("=")]
    return {unquote(key): None if value == _HIVE_NULL else unquote(value) for key, value in pairs}


def column_type(footers: Sequence[Footer], name: str, ids: bool = False) -> pa.DataType | None:
    """The standard type of a column over all files that have it: as base.standard_type, and timestamp[us].

    ids: as keys, so that floats are integers. None for a type that no column may have. Raises DataError if two files cannot
    be joined, or if a file has two columns of this name.
    """
    kinds: list[tuple[Footer, pa.DataType]] = []
    for footer in footers:
        if not footer.rows or name not in footer.schema.names:
            continue
        base.unique_names(footer.schema.names, [name], footer.uri)
        raw = footer.schema.field(name).type
        kind = pa.timestamp("us") if base.is_time(raw) else base.standard_type(raw)
        if kind is None:
            return None
        kinds.append((footer, _WIDE if _maybe_wide(raw) and not _fits_int64(footer, name) else kind))
    joined, clash = _join(kinds)
    if clash:
        # A text column without a value is written as floats by pandas.
        joined, clash = _join([(footer, kind) for footer, kind in kinds if _has_values(footer, name)])
    if clash:
        (one, was), (other, now) = clash
        raise DataError(
            f"{other.uri}: column '{name}' is {now}, but {was} in {one.uri}: all files must hold the same; rewrite one"
        )
    joined = _with_partitions(joined, footers, name)
    if joined == _WIDE:
        return pa.string()
    return pa.int64() if ids and joined == pa.float64() else joined


def _with_partitions(kind: pa.DataType, footers: Sequence[Footer], name: str) -> pa.DataType:
    """The type with the values of folders, which are text that may stand for integers."""
    folders = [f for f in footers if f.rows and name in f.hive and name not in f.schema.names]
    texts = [(footer, value) for footer in folders if (value := footer.hive[name]) is not None]
    odd = next(((footer, value) for footer, value in texts if not _INTEGER.fullmatch(value)), None)
    if not texts or pa.types.is_string(kind):
        return kind
    if odd is None:
        return pa.int64() if pa.types.is_null(kind) else kind
    if pa.types.is_null(kind):
        return pa.string()
    raise DataError(f"{odd[0].uri}: the folder says {name}={odd[1]}, but column '{name}' of other files is {kind}")


def _join(kinds: Iterable[tuple[Footer, pa.DataType]]) -> tuple[pa.DataType, list[tuple[Footer, pa.DataType]]]:
    """The type that holds all of these, and the two that have none in common."""
    joined, first = pa.null(), None
    for footer, kind in kinds:
        both = join_types(joined, kind)
        if both is None:
            assert first is not None
            return joined, [(first, joined), (footer, kind)]
        if pa.types.is_null(joined):
            first = footer
        joined = both
    return joined, []


def join_types(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """The standard type that holds both, None when there is none."""
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if pa.types.is_list(a) and pa.types.is_list(b):
        inner = join_types(a.value_type, b.value_type)
        return None if inner is None else pa.list_(pa.field("element", inner))
    order = [pa.int64(), _WIDE, pa.float64()]
    return order[max(order.index(a), order.index(b))] if a in order and b in order else None


def _maybe_wide(kind: pa.DataType) -> bool:
    """Whether values may be integers that int64 does not hold."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return kind == pa.uint64() or bool(pa.types.is_decimal(kind) and kind.scale == 0 and kind.precision > 18)


def _fits_int64(footer: Footer, name: str) -> bool:
    """By the file's statistics; without them yes, and reading fails where a value does not fit."""
    for _, stats in _statistics(footer, name):
        if stats is not None and stats.has_min_max and not -(2**63) <= stats.min <= stats.max < 2**63:
            return False
    return True


def _has_values(footer: Footer, name: str) -> bool:
    """Whether a column has a value that is not null, by the file's statistics; without them yes, and for lists."""
    if pa.types.is_nested(footer.schema.field(name).type):
        return True  # statistics do not tell null from an empty list
    facts = list(_statistics(footer, name))
    return not facts or any(
        stats is None or not stats.has_null_count or stats.null_count < values for values, stats in facts
    )


def _statistics(footer: Footer, name: str) -> Iterator[tuple[int, pq.Statistics | None]]:
    """(values with nulls, statistics) of a column's first leaf in every row group; nothing of a file with encrypted columns."""
    if _signed(footer):
        return
    place = footer.schema.names.index(name)
    leaf = sum(_leaves(field.type) for field in list(footer.schema)[:place])
    with storage.open_parquet(footer.uri) as file:
        if leaf < file.metadata.num_columns:
            for group in range(file.metadata.num_row_groups):
                column = file.metadata.row_group(group).column(leaf)
                yield column.num_values, column.statistics


def _signed(footer: Footer) -> bool:
    """Whether a plain footer ends with the signature of 28 bytes of a file with encrypted columns.

    pyarrow 26 ends the process when it is asked for the statistics of an encrypted column.
    """
    system, path = storage.resolve(footer.uri)
    with storage.open_parquet(footer.uri) as file, system.open_input_file(path) as stream:
        length = int.from_bytes(stream.read_at(4, footer.size - 8), "little")
        return bool(length - file.metadata.serialized_size == 28)


def _leaves(kind: pa.DataType) -> int:
    """How many Parquet columns a type takes."""
    if isinstance(kind, pa.BaseExtensionType):
        return _leaves(kind.storage_type)
    if pa.types.is_nested(kind):
        return sum(_leaves(kind.field(i).type) for i in range(kind.num_fields))
    return 1


def read_columns(
    uri: str, hive: Mapping[str, str | None], names: Sequence[str], groups: Sequence[int] | None = None
) -> dict[str, pa.ChunkedArray]:
    """Columns of a file, or of some of its row groups, as they are there; partitions as text; what is missing as nulls."""
    with storage.open_parquet(uri) as file:
        there = [name for name in dict.fromkeys(names) if name in file.schema_arrow.names]
        groups = range(file.metadata.num_row_groups) if groups is None else groups
        rows = sum(file.metadata.row_group(group).num_rows for group in groups)
        table = file.read_row_groups(list(groups), columns=there, use_threads=False)
    found = {name: table[name] for name in there}
    for name in names:
        if name not in found:
            found[name] = pa.chunked_array([pa.array([hive.get(name)] * rows, pa.string())])
    return found


def by_key(footers: Sequence[Footer], key: str, names: Sequence[str], keys: pa.Array) -> pa.Table:
    """These columns of a table of users or items in the order of `keys`: null for one that is not there, the first row for
    one that is there twice."""
    kinds = {field.name: field.type for footer in footers for field in footer.schema}
    parts = []
    for footer in footers:
        columns = read_columns(footer.uri, footer.hive, [key, *names])
        own = {str(number): columns[name].cast(kinds[name]) for number, name in enumerate(names)}
        parts.append(pa.table({"key": columns[key].cast(keys.type), **own}))
    both = pa.concat_tables(parts)
    place = pc.index_in(keys, value_set=both["key"].combine_chunks())
    return pa.table([both[str(number)].take(place) for number in range(len(names))], names=list(names))


def key_type(footers: Sequence[Footer], name: str, like: pa.DataType) -> pa.DataType | None:
    """The type of a key; text for integers of a type whose larger values are text in `like`."""
    kind = column_type(footers, name, ids=True)
    raw = [footer.schema.field(name).type for footer in footers if name in footer.schema.names]
    return like if like == pa.string() and kind == pa.int64() and raw and all(map(_maybe_wide, raw)) else kind


def shared_key_type(log: Sequence[Footer], side: Sequence[Footer], name: str) -> pa.DataType | None:
    """The type of a key in the log and in a side table; None if they have none in common, which is reported later."""
    with contextlib.suppress(DataError):
        return column_type([*log, *side], name, ids=True)
    return None


def report_missing(footers: Sequence[Footer], names: Iterable[str], what: str) -> None:
    """Log the columns that some files lack: their rows have nulls there."""
    for name in names:
        lacking = [footer for footer in footers if name not in footer.names]
        if lacking:
            rows, all_rows = sum(f.rows for f in lacking), sum(f.rows for f in footers)
            log.warning(
                "prepare",
                f"{what}: column '{name}' is missing in {len(lacking):,} of {len(footers):,} files, such as {lacking[0].uri}: "
                f"null in {rows:,} of {all_rows:,} rows",
                event="column_missing",
                values={"column": name, "files": len(lacking), "rows": rows},
            )


def side_table(
    footers: Sequence[Footer],
    uri: str,
    role: Side,
    key: str,
    declared: Sequence[str],
    events: Sequence[Footer],
) -> pa.Table:
    """An item or user table in standard types, its unique key first and called `role`.

    declared: the columns to read; without any, all that can be converted, and the partitions below `uri`.
    events: the files of the log, whose keys have the same type where possible.
    """
    full = [footer for footer in footers if footer.rows] or list(footers[:1])
    names = dict.fromkeys(name for footer in full for name in footer.names)
    for footer in full:
        if key not in footer.names:
            raise DataError(
                f"{footer.uri} has no column '{key}' to join on{base.did_you_mean(key, footer.names)}; "
                f"columns there: {', '.join(footer.names)}; rename its key to data.columns.{role}"
            )
    for name in declared:
        if name not in names:
            raise DataError(
                f"{uri} has no column '{name}'{base.did_you_mean(name, names)}; columns there: {', '.join(names)}; "
                f"change data.{role}_features"
            )
    above = partitions(f"{uri}/")
    others = dict.fromkeys(declared or (name for name in names if name not in above))
    others.pop(key, None)
    types = {key: shared_key_type(events, full, key) or column_type(full, key, ids=True)}
    left: dict[str, str] = {}
    for name in others:
        try:
            types[name] = column_type(full, name)
            if types[name] is None:
                raise DataError(f"{uri}: column '{name}' is {_raw_type(full, name)}, which is no type of a feature")
        except DataError as error:
            _leave_out(name, error, declared, left)
    kept = {name: kind for name, kind in types.items() if name not in left}
    report_missing(full, kept, uri)
    parts = [_standard_columns(footer, key, kept, declared, left) for footer in full]
    if left:
        reasons = "; ".join(left.values())
        log.info("prepare", f"left out of the {role} features: {reasons}", event="columns_left_out", values=left)
    same = [name for name in kept if name not in left]
    return base.keyed_table(pa.concat_tables([pa.table({n: part[n] for n in same}) for part in parts]), key, role, uri)


def _standard_columns(
    footer: Footer, key: str, types: Mapping[str, pa.DataType | None], declared: Sequence[str], left: dict[str, str]
) -> dict[str, pa.ChunkedArray]:
    """The columns of one file; one that is not declared and cannot be converted is added to `left`."""
    found = {}
    for name, column in read_columns(footer.uri, footer.hive, list(types)).items():
        where = f"{footer.uri}: column '{name}'"
        if name == key:
            found[name] = base.ids(column, where, types[name])
            continue
        try:
            found[name] = base.standardised(column, types[name], where)
        except DataError as error:
            _leave_out(name, error, declared, left)
    return found


def _leave_out(name: str, error: DataError, declared: Sequence[str], left: dict[str, str]) -> None:
    if name in declared:
        raise error
    left.setdefault(name, str(error))


def _raw_type(footers: Sequence[Footer], name: str) -> pa.DataType:
    return next(footer.schema.field(name).type for footer in footers if name in footer.schema.names)
