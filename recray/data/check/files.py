"""What footers tell of a log: damaged and small files, row groups, columns that differ between files."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from recray.data.check.findings import Finding, Level
from recray.data.sampling import shown
from recray.data.sources import base, tables
from recray.data.sources.tables import Footer
from recray.errors import DataError, RecrayError, StorageError
from recray.storage import FileInfo

_SMALL_FILE = 4 << 20  # bytes on average below which
_MANY_FILES = 32  # this many files are worth merging
_SMALL_GROUP = 10_000  # rows on average
_MANY_GROUPS = 16
_HUGE_GROUP = 256 << 20  # bytes before compression
_SHOWN = 3  # files named in a message


def read_footers(files: Sequence[FileInfo]) -> tuple[list[Footer], list[Finding]]:
    """The footers that can be read, and findings about the others."""

    def one(info: FileInfo) -> Footer | str:
        try:
            return tables.read_footers([info])[0]
        except (DataError, StorageError) as error:
            return str(error)

    with ThreadPoolExecutor(16) as pool:
        read = list(pool.map(one, files))
    broken = [entry for entry in read if isinstance(entry, str)]
    found = []
    if broken:
        found.append(
            Finding(
                "error",
                "damaged_files",
                f"{len(broken):,} of {len(files):,} files cannot be read: {'; '.join(broken[:_SHOWN])}",
                "prepare stops at the first of them",
                "write these files again, or move them out of the folder",
                {"files": len(broken)},
            )
        )
    return [entry for entry in read if isinstance(entry, Footer)], found


def of_files(path: str, footers: Sequence[Footer]) -> Iterator[Finding]:
    """Sizes of files and row groups."""
    full = [footer for footer in footers if footer.rows]
    if len(full) < len(footers):
        yield Finding("note", "empty_files", f"{len(footers) - len(full):,} of {len(footers):,} files hold no rows")
    merge = f"recray compact {shlex.quote(path)} merged"
    mean = sum(footer.size for footer in full) / max(len(full), 1)
    if len(full) >= _MANY_FILES and mean < _SMALL_FILE:
        yield Finding(
            "warning",
            "small_files",
            f"{len(full):,} files of {_size(mean)} on average",
            f"each file is opened on its own: two requests of about 50 ms to an object store, {len(full) * 0.1:,.0f} s of waiting "
            f"per pass, shared by its readers",
            merge,
            {"files": len(full), "mean_bytes": round(mean)},
        )
    groups = [(rows, size) for footer in full for rows, size in zip(footer.group_rows, footer.group_bytes, strict=True)]
    per_file = len(groups) / max(len(full), 1)
    rows = sum(rows for rows, _ in groups) / max(len(groups), 1)
    if len(groups) >= _MANY_GROUPS and per_file >= 2 and rows < _SMALL_GROUP:
        yield Finding(
            "warning",
            "small_row_groups",
            f"{len(groups):,} row groups of {rows:,.0f} rows on average",
            "each row group is decoded on its own and compresses badly: files are larger and slower to read",
            merge,
            {"groups": len(groups), "mean_rows": round(rows)},
        )
    huge = [size for _, size in groups if size > _HUGE_GROUP]
    if huge:
        yield Finding(
            "warning",
            "huge_row_groups",
            f"{len(huge):,} row groups of more than {_size(_HUGE_GROUP)}, the largest {_size(max(huge))} before compression",
            f"a row group is read by one task at a time: each needs about {_size(2 * max(huge))} of memory",
            merge,
            {"groups": len(huge), "largest_bytes": max(huge)},
        )


def of_columns(footers: Sequence[Footer], used: Sequence[str]) -> Iterator[Finding]:
    """Columns that are missing, twice there, or of different types. used: columns that prepare reads, without partitions."""
    full = [footer for footer in footers if footer.rows]
    for name in dict.fromkeys(name for footer in full for name in footer.schema.names):
        having = [footer for footer in full if name in footer.schema.names]
        twice = [footer for footer in having if footer.schema.names.count(name) > 1]
        if twice:
            yield Finding(
                "error" if name in used else "note",
                "repeated_columns",
                f"{len(twice):,} files have two columns called {shown(name)}, such as {twice[0].uri}",
                "prepare cannot tell which one is meant" if name in used else "",
                "rename one of them",
            )
            continue
        yield from _drift(having, name, name in used)
        if name in used and len(having) < len(full):
            lacking = [footer for footer in full if name not in footer.names]
            if lacking:
                yield Finding(
                    "error",
                    "missing_columns",
                    f"column {shown(name)} is missing in {len(lacking):,} of {len(full):,} files, such as {lacking[0].uri}",
                    f"prepare stops, or has nulls in {sum(footer.rows for footer in lacking):,} rows",
                    f"write these files with {shown(name)}, or move them out of the folder",
                    {"column": name, "files": len(lacking)},
                )


def _drift(having: Sequence[Footer], name: str, used: bool) -> Iterator[Finding]:
    """A column whose types have none in common, or only a lossy one."""
    kinds: dict[pa.DataType, list[Footer]] = {}
    for footer in having:
        kinds.setdefault(footer.schema.field(name).type, []).append(footer)
    if len(kinds) < 2:
        return
    there = ", ".join(f"{kind} in {len(files):,} files" for kind, files in kinds.items())
    rarest = min(kinds.values(), key=len)[0].uri
    values = {"column": name, "types": {str(kind): len(files) for kind, files in kinds.items()}}
    level: Level = "note"
    try:
        tables.column_type(having, name)
    except RecrayError:
        cost = "prepare stops: no type holds both" if used else "the column cannot be a feature"
        level = "error" if used else "note"
    else:
        if not {pa.int64(), pa.float64()} <= {base.standard_type(kind) for kind in kinds}:
            return  # int32 and int64, text and dictionaries: the same values
        cost = "integers above 2^53 are rounded where the type is a float"
        level = "warning" if used else "note"
    what = f"column {shown(name)} is {there}; such as {rarest}"
    yield Finding(level, "type_drift", what, cost, f"write all files with one type of {shown(name)}", values)


def _size(number: float) -> str:
    return f"{number / 1e6:,.1f} MB" if number >= 1e6 else f"{number / 1e3:,.0f} KB"
