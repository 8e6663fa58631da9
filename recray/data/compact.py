"""`recray compact`: many small Parquet files to a few that stream well.

Every file costs a request, a footer, and a dictionary for each of its columns, however few rows it has. The rows are the same
and in the order of the files; with `sort`, those of one new file are in that order. Folders key=value become columns.

LZ4 takes a fourth more space than zstd and two thirds of the time to read: a log is read many times.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from recray import layout, progress, storage
from recray.cluster import cpus
from recray.data.sources import base, files, tables
from recray.data.sources.tables import Footer
from recray.errors import DataError

_FILE_BYTES = 256 << 20  # of a new file, before compression
_GROUP_ROWS = 262_144
_TIMED_ROWS, _TIMES = 2_000_000, 3


@dataclass(frozen=True)
class Compacted:
    """What was read and written; rows per second are of one thread that reads all columns, before and after."""

    rows: int
    files_before: int
    files: int
    bytes_before: int
    bytes: int
    rows_per_second_before: float
    rows_per_second: float


def compact(uri: str, output: str, sort: str | None = None, file_bytes: int = _FILE_BYTES) -> Compacted:
    """Write the rows of all Parquet files at `uri` into the folder `output`, `file_bytes` of memory a file.

    sort: column that each new file is sorted by, such as the time. Raises DataError if there are no rows, if files have
    types that cannot be joined, or without that column; StorageError if `output` holds anything.
    """
    layout.refuse_foreign(output, layout.NOTHING)
    footers = [footer for footer in tables.read_footers(files.find(uri, "compact")) if footer.rows]
    if not footers:
        raise DataError(f"{uri} holds no rows: there is nothing to compact")
    schema = _schema(footers)
    if sort is not None and sort not in schema.names:
        there = ", ".join(schema.names)
        raise DataError(f"{uri} has no column '{sort}'{base.did_you_mean(sort, schema.names)}; columns there: {there}")

    def write(number: int, group: list[Footer]) -> None:
        table = pa.concat_tables([_read(footer, schema) for footer in group])
        table = table if sort is None else table.sort_by(sort)
        storage.write_table(storage.join(output, f"part-{number:05d}.parquet"), table, _GROUP_ROWS, "lz4")

    groups = _groups(footers, file_bytes)
    with ThreadPoolExecutor(cpus.available()) as pool, progress.task("compact", "writing", len(groups)) as bar:
        for _ in pool.map(write, range(len(groups)), groups):
            bar.update()
    written = tables.read_footers(files.find(output, "compact"))
    if sum(footer.rows for footer in written) != sum(footer.rows for footer in footers):
        raise DataError(
            f"{output} has other rows than {uri}, which changed meanwhile: delete {output}, and compact again"
        )
    before, after = _rows_per_second(footers, written)
    return Compacted(
        rows=sum(footer.rows for footer in written),
        files_before=len(footers),
        files=len(written),
        bytes_before=sum(footer.size for footer in footers),
        bytes=sum(footer.size for footer in written),
        rows_per_second_before=before,
        rows_per_second=after,
    )


def _schema(footers: Sequence[Footer]) -> pa.Schema:
    """The columns of all files, in types that hold all their values."""
    schemas = [footer.schema.remove_metadata() for footer in footers]
    try:
        schema = pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise DataError(f"the files from {footers[0].uri} on cannot be joined: {error}; convert that column") from error
    folders = dict.fromkeys(name for footer in footers for name in footer.hive if name not in schema.names)
    return pa.schema([*schema, *(pa.field(name, pa.string()) for name in folders)])


def _groups(footers: Sequence[Footer], file_bytes: int) -> list[list[Footer]]:
    """Files in order, about `file_bytes` together; a larger file is one by itself."""
    groups: list[list[Footer]] = []
    held = file_bytes
    for footer in footers:
        size = sum(footer.group_bytes)
        if held + size > file_bytes:
            groups.append([])
            held = 0
        groups[-1].append(footer)
        held += size
    return groups


def _read(footer: Footer, schema: pa.Schema) -> pa.Table:
    columns = tables.read_columns(footer.uri, footer.hive, schema.names)
    return pa.table([columns[field.name].cast(field.type) for field in schema], schema=schema)


def _rows_per_second(*logs: Sequence[Footer]) -> list[float]:
    """The best of some passes over each log, in turns, so that other work on the machine slows them alike. The first pass
    brings the files into the page cache."""
    timed = [_first(log) for log in logs]
    best = [float("inf")] * len(logs)
    for _ in range(_TIMES):
        for number, footers in enumerate(timed):
            started = time.perf_counter()
            for footer in footers:
                tables.read_columns(footer.uri, footer.hive, footer.schema.names)
            best[number] = min(best[number], time.perf_counter() - started)
    return [sum(footer.rows for footer in footers) / max(b, 1e-9) for footers, b in zip(timed, best, strict=True)]


def _first(footers: Sequence[Footer]) -> list[Footer]:
    """Files with about _TIMED_ROWS rows."""
    found: list[Footer] = []
    for footer in footers:
        if sum(one.rows for one in found) >= _TIMED_ROWS:
            break
        found.append(footer)
    return found
