"""Events in Parquet: any file, folder, glob or list of them, local, s3:// or gs://.

Columns are named in [data.columns]; a folder called key=value is a column, as Hive
and Spark write partitions. Every footer is read and checked before any row is; a
bad value is reported with its file and column. Small files are read together and
large ones by row groups, about _TASK_BYTES a task.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recray import storage
from recray.config import ColumnsConfig, DataConfig
from recray.config.sources import ParquetOptions as Options
from recray.data.sources import base
from recray.data.sources.base import Source
from recray.errors import ConfigError, DataError, StorageError
from recray.records import feature_column

__all__ = ["Options", "read"]
_TASK_BYTES = 64 << 20
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class _Footer:
    uri: str
    size: int
    split: str | None  # the split that the file's role in the configuration names
    schema: pa.Schema
    group_rows: list[int]
    group_bytes: list[int]
    hive: dict[str, str | None]

    @property
    def rows(self) -> int:
        return sum(self.group_rows)

    def type_of(self, name: str) -> pa.DataType | None:
        """Of a column or a partition; None when it is neither."""
        if name in self.schema.names:
            return self.schema.field(name).type
        if name not in self.hive:
            return None
        value = self.hive[name]
        return pa.null() if value is None else pa.int64() if re.fullmatch(r"-?\d{1,18}", value) else pa.string()


@dataclass(frozen=True)
class _Piece:
    """Row groups of one file: what a task reads."""

    uri: str
    split: str | None
    hive: dict[str, str | None]
    groups: list[int]
    order: int  # of the first row: (file index << 40) + row in the file
    size: int


@dataclass(frozen=True)
class _Plan:
    """What every task knows about the columns."""

    columns: ColumnsConfig
    unit: str | None  # None: no timestamp column
    types: dict[str, pa.DataType]  # standard type of each role's column over all files


_checked: list[tuple[DataConfig, list[_Footer], dict[str, pa.DataType]]] = []  # by `check`, for the `read` after it


def read(config: DataConfig, seed: int) -> Source:
    """The log as a Ray Dataset in standard columns. Raises DataError or StorageError that names the file."""
    import ray.data

    held = _checked.pop() if _checked else None
    _, footers, types = held if held is not None and held[0] is config else _inspect(config)
    full = [footer for footer in footers if footer.rows]
    if not full:
        raise DataError(f"the {len(footers)} Parquet files from {footers[0].uri} on hold no rows; check data.path")
    plan = _Plan(config.columns, _unit(config, full), types)
    # A task is a JSON list of pieces: small, and the same whatever reads it.
    tasks = [{"pieces": json.dumps([asdict(piece) for piece in group])} for group in _group(_pieces(full))]
    work = ray.data.from_items(tasks, override_num_blocks=len(tasks))
    return Source(
        events=work.map_batches(_read_task, batch_size=1, batch_format="pyarrow", fn_kwargs={"plan": plan}),
        num_events=sum(footer.rows for footer in full),
        fingerprint=storage.fingerprint([storage.FileInfo(footer.uri, footer.size) for footer in footers]),
        has_time=plan.unit not in (None, "order"),
        items=base.side_table(config.items, config.columns.item, "item"),
        users=base.side_table(config.users, config.columns.user, "user"),
        types=types,
    )


def check(config: DataConfig) -> None:
    """Raises what `read` would about paths and columns, from the footers of the files."""
    _checked[:] = [_inspect(config)]


def _inspect(config: DataConfig) -> tuple[DataConfig, list[_Footer], dict[str, pa.DataType]]:
    """Every file's footer, and the standard type of each role's column."""
    footers = _footers(config)
    return config, footers, _check_columns(config.columns, footers)


def _footers(config: DataConfig) -> list[_Footer]:
    split = config.split
    given = {"train": split.train_path, "valid": split.valid_path, "test": split.test_path}
    parts: list[tuple[str | list[str], str | None]]
    if split.kind == "given" and any(given.values()):
        if not (split.train_path and split.test_path):
            raise ConfigError("data.split.kind = 'given' needs both data.split.train_path and data.split.test_path")
        parts = [(path, name) for name, path in given.items() if path]
    elif config.path:
        if split.kind == "given" and not config.columns.split:
            raise ConfigError(
                "data.split.kind = 'given' needs data.split.train_path and data.split.test_path, "
                "or a column that names the split: data.columns.split"
            )
        parts = [(config.path, None)]
    else:
        raise ConfigError("data.path is not set: give a Parquet file, a folder, a glob or a list of them")
    listed = [(info, name) for path, name in parts for info in storage.list_files(path)]
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda pair: _footer(*pair), listed))


def _footer(info: storage.FileInfo, split: str | None) -> _Footer:
    with _opened(info.uri) as file:
        meta = file.metadata
        groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
        folders = [part.split("=", 1) for part in info.uri.split("/")[:-1] if re.fullmatch(r"[^=]+=[^=]*", part)]
        hive = {key: None if value == _HIVE_NULL else unquote(value) for key, value in folders}
        rows, sizes = [g.num_rows for g in groups], [g.total_byte_size for g in groups]
        return _Footer(info.uri, info.size, split, file.schema_arrow, rows, sizes, hive)


@contextmanager
def _opened(uri: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file; what fails inside names it."""
    system, path = storage.resolve(uri)
    try:
        with system.open_input_file(path) as stream:
            yield pq.ParquetFile(stream)
    except (pa.ArrowInvalid, OSError) as error:
        # Arrow reports broken pages and footers as OSError without an errno.
        if isinstance(error, OSError) and (error.errno is not None or "AWS Error" in str(error)):
            raise StorageError(f"{uri} cannot be read: {error}; check the path and the credentials") from error
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{uri} is not a whole Parquet file (truncated or corrupt): {reason}; write it again or take it out"
        ) from error


def _roles(columns: ColumnsConfig) -> dict[str, str]:
    """Role -> column name, of the roles that have one."""
    roles = {role: getattr(columns, role) for role in ("user", "item", "timestamp", "label", "weight", "split")}
    named = {role: name for role, name in roles.items() if name is not None}
    return named | {feature_column("context", name): name for name in columns.context}


_ALLOWED = {
    "user": "integers or strings",
    "item": "integers or strings",
    "timestamp": "integers, floats (seconds, say) or a timestamp type",
    "label": "numbers 0 and 1, or booleans",
    "weight": "numbers",
    "split": "strings train, valid, test",
    "context": "integers, numbers, booleans, strings or lists of these",
}


def _check_columns(columns: ColumnsConfig, footers: list[_Footer]) -> dict[str, pa.DataType]:
    """The standard type of each role's column over all files. Raises DataError on a missing or wrong one."""
    types: dict[str, pa.DataType] = {}
    first: dict[str, str] = {}
    for full_role, name in _roles(columns).items():
        role = "context" if full_role.startswith("context_") else full_role
        for footer in footers:
            base.unique_names(footer.schema.names, [name], footer.uri)
            raw = footer.type_of(name)
            if raw is None:
                raise DataError(_missing(footer, name, role))
            kind = base.standard_type(raw)
            if role in ("timestamp", "context") and (pa.types.is_timestamp(raw) or pa.types.is_date(raw)):
                kind = pa.timestamp("us")
            if not _fits(role, kind):
                raise DataError(
                    f"{footer.uri}: column '{name}' is {raw}, but role {role} takes {_ALLOWED[role]}; convert it"
                )
            before = types.get(full_role, pa.null())
            joined = _joined(before, kind)
            if joined is None:
                raise DataError(
                    f"{footer.uri}: column '{name}' is {kind}, but {before} in {first[full_role]}: "
                    f"all files must hold the same; rewrite one"
                )
            if before == pa.null():
                first[full_role] = footer.uri
            types[full_role] = joined
    return types


def _fits(role: str, kind: pa.DataType | None) -> bool:
    if kind is None:
        return False
    if role == "context" or kind == pa.null():
        return True  # a column of nulls has no type yet; its nulls are reported when it is read
    number = kind in (pa.int64(), pa.float64())
    if role == "timestamp":
        return bool(number or pa.types.is_timestamp(kind))
    if role in ("label", "weight"):
        return bool(number)
    return kind == pa.string() if role == "split" else kind in (pa.int64(), pa.string())


def _joined(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """The type that holds both, None when there is none."""
    if a == b or b == pa.null():
        return a
    if a == pa.null():
        return b
    if pa.types.is_list(a) and pa.types.is_list(b):
        inner = _joined(a.value_type, b.value_type)
        return None if inner is None else pa.list_(pa.field("element", inner))
    return pa.float64() if {a, b} == {pa.int64(), pa.float64()} else None


def _missing(footer: _Footer, name: str, role: str) -> str:
    there = [*footer.schema.names, *footer.hive]
    hint = base.did_you_mean(name, there)
    return f"{footer.uri} has no column '{name}'{hint}; columns there: {', '.join(there)}; set data.columns.{role}"


def _unit(config: DataConfig, full: list[_Footer]) -> str | None:
    """The unit of the timestamps: declared, or by the magnitude of the first file's; checked on its first row group."""
    name = config.columns.timestamp
    if name is None:
        return None
    first = full[0]
    if name not in first.schema.names:
        return "s" if config.timestamp_unit == "auto" else config.timestamp_unit
    with _opened(first.uri) as file:
        group = next(i for i, rows in enumerate(first.group_rows) if rows)
        column = file.read_row_group(group, columns=[name], use_threads=False)[name]
    where = f"{first.uri}: column '{name}'"
    unit = base.infer_unit(column, where) if config.timestamp_unit == "auto" else config.timestamp_unit
    base.microseconds(column, unit, where)
    return unit


def _pieces(footers: list[_Footer]) -> Iterator[_Piece]:
    """Files in order; those above _TASK_BYTES by row groups."""
    for index, footer in enumerate(footers):
        scale = footer.size / max(sum(footer.group_bytes), 1)  # footers give sizes before compression
        start = row = 0
        held = 0.0
        for group, size in enumerate(footer.group_bytes):
            held += size * scale
            last = group == len(footer.group_rows) - 1
            if held >= _TASK_BYTES or last:
                groups = list(range(start, group + 1))
                yield _Piece(footer.uri, footer.split, footer.hive, groups, (index << 40) + row, int(held))
                row += sum(footer.group_rows[start : group + 1])
                start, held = group + 1, 0.0


def _group(pieces: Iterator[_Piece]) -> list[list[_Piece]]:
    groups: list[list[_Piece]] = [[]]
    held = 0
    for piece in pieces:
        if groups[-1] and held + piece.size > _TASK_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(piece)
        held += piece.size
    return groups


def _read_task(batch: pa.Table, plan: _Plan) -> Iterator[pa.Table]:
    for text in batch["pieces"].to_pylist():
        for piece in json.loads(text):
            yield _read_piece(_Piece(**piece), plan)


def _read_piece(piece: _Piece, plan: _Plan) -> pa.Table:
    """Row groups of one file in standard columns."""
    roles = _roles(plan.columns)
    with _opened(piece.uri) as file:
        there = [name for name in dict.fromkeys(roles.values()) if name in file.schema_arrow.names]
        table = file.read_row_groups(piece.groups, columns=there, use_threads=False)
    rows = table.num_rows
    order = pa.array(np.arange(piece.order, piece.order + rows, dtype=np.int64))
    out: dict[str, Any] = {"time": order, "order": order}
    for role, name in roles.items():
        column = table[name] if name in there else pa.chunked_array([pa.array([piece.hive[name]] * rows, pa.string())])
        target = "time" if role == "timestamp" else role
        out[target] = _standard(column, role, plan, f"{piece.uri}: column '{name}'")
    if piece.split is not None:
        out["split"] = pa.array([piece.split] * rows, pa.string())
    first = [name for name in base.STANDARD if name in out]
    return pa.table({name: out[name] for name in [*first, *(name for name in out if name not in first)]})


def _standard(column: pa.ChunkedArray, role: str, plan: _Plan, where: str) -> pa.ChunkedArray | pa.Array:
    kind = plan.types[role]
    if role in ("user", "item"):
        return base.ids(base.standardised(column, kind, where) if column.null_count < len(column) else column, where)
    if role == "timestamp":
        column = base.standardised(column, kind, where) if pa.types.is_string(column.type) else column
        return base.microseconds(column, plan.unit or "order", where)
    if role in ("label", "weight"):
        return base.finite(column, role, where)
    if role == "split":
        return base.splits(column, where)
    return base.standardised(column, pa.string() if kind == pa.null() else kind, where)
