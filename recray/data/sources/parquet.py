"""Events in Parquet: any file, folder, glob or list of them, local, s3:// or gs://.

Columns are named in [data.columns]; others are not read. Which files are read: recray.data.sources.files; what a column
is over files that differ: recray.data.sources.tables. Every footer is read and checked before any row is; a bad value is
reported with its file and column. Small files are read together and large ones by row groups, about _TASK_BYTES a task.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from recray import digests, log, storage
from recray.config import ColumnsConfig, DataConfig
from recray.config.sources import ParquetOptions as Options
from recray.data.sources import base, files, tables
from recray.data.sources.base import Source
from recray.data.sources.tables import Footer, Side
from recray.errors import ConfigError, DataError
from recray.records import InputFile, feature_column
from recray.storage import FileInfo

if TYPE_CHECKING:
    import ray.data

__all__ = ["Options", "read"]
_TASK_BYTES = 64 << 20
_ROW_BITS = 40  # of an event's order; the index of its file comes before them
_LISTED_FILES = 1_000  # more of them are recorded by folder


@dataclass(frozen=True)
class _Piece:
    """Row groups of one file: what a task reads."""

    uri: str
    split: str | None
    hive: dict[str, str | None]
    groups: list[int]
    order: int  # of the first row: (file index << _ROW_BITS) + row in the file
    size: int


@dataclass(frozen=True)
class _Plan:
    """What every task knows about the columns."""

    columns: ColumnsConfig
    unit: str | None  # None: no timestamp column
    types: dict[str, pa.DataType]  # standard type of each role's column over all files


@dataclass(frozen=True)
class Log:
    """The files of a configuration, with footers read and columns checked; no Ray here."""

    config: DataConfig
    footers: list[tuple[Footer, str | None]]  # and the split that the key in the configuration names
    sides: dict[Side, list[Footer]]
    plan: _Plan

    @staticmethod
    def open(config: DataConfig) -> Log:
        """Raises DataError or StorageError that names the file."""
        footers = [(footer, split) for path, split in paths(config) for footer in tables.read_footers(files.find(path))]
        _check_splits(footers)
        full = [footer for footer, _ in footers if footer.rows]
        if not full:
            first = footers[0][0].uri
            raise DataError(f"the {len(footers)} Parquet files from {first} on hold no rows; check data.path")
        uris: dict[Side, str | None] = {"item": config.items, "user": config.users}
        sides = {role: tables.read_footers(files.find(uri)) for role, uri in uris.items() if uri is not None}
        types = _column_types(config.columns, full, sides)
        return Log(config, footers, sides, _Plan(config.columns, _unit(config, full, types), types))

    @property
    def full(self) -> list[Footer]:
        """The files that have rows."""
        return [footer for footer, _ in self.footers if footer.rows]

    def tasks(self, first: int = 0) -> list[str]:
        """What reads the files from number `first` on. A task is a JSON list of pieces: small, and the same whatever reads it."""
        index = sum(1 for footer, _ in self.footers[:first] if footer.rows)
        pieces = _pieces([pair for pair in self.footers if pair[0].rows])
        groups = _group(piece for piece in pieces if piece.order >> _ROW_BITS >= index)
        return [json.dumps([asdict(piece) for piece in group]) for group in groups]

    def events(self, first: int = 0) -> tuple[ray.data.Dataset | None, int]:
        """Events of the files from number `first` on, and how many; None if there are none."""
        import ray.data

        tasks = [{"pieces": task} for task in self.tasks(first)]
        if tasks == [{"pieces": "[]"}]:
            return None, 0
        work = ray.data.from_items(tasks, override_num_blocks=len(tasks))
        events = work.map_batches(_read_batch, batch_size=1, batch_format="pyarrow", fn_kwargs={"plan": self.plan})
        return events, sum(footer.rows for footer, _ in self.footers[first:])

    def side_table(self, role: Side) -> pa.Table | None:
        if role not in self.sides:
            return None
        uri, key = getattr(self.config, f"{role}s"), getattr(self.config.columns, role)
        declared = list(getattr(self.config, f"{role}_features"))
        return tables.side_table(self.sides[role], uri, role, key, declared, self.full)

    def fingerprint(self) -> tuple[str, list[InputFile]]:
        """Of the log and its side tables, and their files, those of the log first; logs how it is taken."""
        inputs = [[footer for footer, _ in self.footers], *self.sides.values()]
        files = [[FileInfo(footer.uri, footer.size) for footer in one] for one in inputs]
        states = [digests.file_states(one) for one in files]
        found = [digests.fingerprint(one, state) for one, state in zip(files, states, strict=True)]
        count, size = sum(map(len, inputs)), sum(footer.size for one in inputs for footer in one)
        known_by = " and ".join(dict.fromkeys(how for _, how in found))
        log.info(
            "prepare",
            f"{count:,} input file{'s' * (count > 1)}, {size / 1e6:,.2f} MB; changes are seen by {known_by}",
            event="input",
            values={"files": count, "bytes": size, "known_by": known_by},
        )
        known = [
            InputFile(uri=info.uri, bytes=info.size, known_by=how, state=state)
            for one, two in zip(files, states, strict=True)
            for info, (how, state) in zip(one, two, strict=True)
        ]
        return hashlib.sha256("".join(digest for digest, _ in found).encode()).hexdigest(), known


def _by_folder(files: list[InputFile]) -> list[InputFile]:
    """Very many files are recorded by folder, with the hash of their names and states."""
    if len(files) <= _LISTED_FILES:
        return files
    folders: dict[str, list[InputFile]] = {}
    for file in files:
        folders.setdefault(file.uri.rpartition("/")[0] + "/", []).append(file)
    return [
        InputFile(
            uri=folder,
            bytes=sum(file.bytes for file in inside),
            files=len(inside),
            known_by=f"hash of names and {inside[0].known_by}",
            state=hashlib.sha256(json.dumps([[file.uri, file.state] for file in inside]).encode()).hexdigest(),
        )
        for folder, inside in folders.items()
    ]


_checked: list[Log] = []  # by `check`, for the `read` after it


def check(config: DataConfig) -> None:
    """Raises what `read` would about paths and columns, from the footers of the files."""
    _checked[:] = [Log.open(config)]


def read(config: DataConfig, seed: int) -> Source:
    """The log as a Ray Dataset in standard columns. Raises DataError or StorageError that names the file."""
    held = _checked.pop() if _checked else None
    opened = held if held is not None and held.config is config else Log.open(config)
    events, num_events = opened.events()
    assert events is not None  # `open` has found rows
    fingerprint, inputs = opened.fingerprint()
    return Source(
        events=events,
        num_events=num_events,
        fingerprint=fingerprint,
        has_time=opened.plan.unit not in (None, "order"),
        items=opened.side_table("item"),
        users=opened.side_table("user"),
        types=opened.plan.types,
        inputs=_by_folder(inputs),
        files=inputs[: len(opened.footers)],
        since=opened.events,
    )


def paths(config: DataConfig) -> list[tuple[str | list[str], str | None]]:
    """Where the log is, and the split that the key in the configuration names."""
    split = config.split
    given = {"train": split.train_path, "valid": split.valid_path, "test": split.test_path}
    if split.kind == "given" and any(given.values()):
        if not (split.train_path and split.test_path):
            raise ConfigError("data.split.kind = 'given' needs both data.split.train_path and data.split.test_path")
        return [(path, name) for name, path in given.items() if path]
    if config.path:
        if split.kind == "given" and not config.columns.split:
            raise ConfigError(
                "data.split.kind = 'given' needs data.split.train_path and data.split.test_path, "
                "or a column that names the split: data.columns.split"
            )
        return [(config.path, None)]
    raise ConfigError("data.path is not set: give a Parquet file, a folder, a glob or a list of them")


def _check_splits(footers: list[tuple[Footer, str | None]]) -> None:
    """Raises DataError if a file is named for two splits."""
    first: dict[str, str | None] = {}
    for footer, split in footers:
        other = first.setdefault(storage.real_path(footer.uri), split)
        if other != split:
            raise DataError(
                f"{footer.uri} is read by data.split.{other}_path and data.split.{split}_path: events of one file are of one "
                f"split; change the paths"
            )


def _roles(columns: ColumnsConfig) -> dict[str, str]:
    """Role -> column name, of the roles that have one."""
    roles = {role: getattr(columns, role) for role in ("user", "item", "timestamp", "label", "weight", "split")}
    named = {role: name for role, name in roles.items() if name is not None}
    return named | {feature_column("context", name): name for name in columns.context}


_ALLOWED = {
    "user": "integers or strings",
    "item": "integers or strings",
    "timestamp": "integers, floats (seconds, say), a timestamp type or ISO 8601 text",
    "label": "numbers 0 and 1, or booleans",
    "weight": "numbers",
    "split": "strings train, valid, test",
    "context": "integers, numbers, booleans, strings or lists of these",
}


def _column_types(
    columns: ColumnsConfig, full: list[Footer], sides: dict[Side, list[Footer]]
) -> dict[str, pa.DataType]:
    """The standard type of each role's column over all files with rows. Raises DataError that names all that do not fit."""
    types: dict[str, pa.DataType] = {}
    problems = []
    for full_role, name in _roles(columns).items():
        role = "context" if full_role.startswith("context_") else full_role
        lacking = [footer for footer in full if name not in footer.names]
        if lacking and (role != "context" or len(lacking) == len(full)):
            problems.append(_missing(lacking[0], name, role))
            continue
        try:
            shared = [tables.shared_key_type(full, side, name) for key, side in sides.items() if key == role]
            kind = next(iter(shared), None) or tables.column_type(full, name, ids=role in ("user", "item"))
        except DataError as error:
            problems.append(str(error))
            continue
        if kind is None or not _fits(role, kind):
            raw = next((f for f in full if name in f.schema.names), None)
            shown = "text" if raw is None else raw.schema.field(name).type
            problems.append(
                f"{(raw or full[0]).uri}: column '{name}' is {shown}, but role {role} takes {_ALLOWED[role]}; convert it"
            )
            continue
        types[full_role] = kind
    if problems:
        raise DataError("\n".join(problems))
    tables.report_missing(full, columns.context, "the log")
    return types


def _fits(role: str, kind: pa.DataType) -> bool:
    if role == "context" or pa.types.is_null(kind):
        return True  # a column of nulls has no type yet; its nulls are reported when it is read
    number = kind in (pa.int64(), pa.float64())
    if role == "timestamp":
        return bool(number or pa.types.is_timestamp(kind) or pa.types.is_string(kind))
    if role in ("label", "weight"):
        return bool(number)
    return kind == pa.string() if role == "split" else kind in (pa.int64(), pa.string())


def _missing(footer: Footer, name: str, role: str) -> str:
    there = footer.names
    return (
        f"{footer.uri} has no column '{name}'{base.did_you_mean(name, there)}; columns there: {', '.join(there)}; "
        f"set data.columns.{role}"
    )


def _unit(config: DataConfig, full: list[Footer], types: Mapping[str, pa.DataType]) -> str | None:
    """The unit of the timestamps: declared, or by the magnitude of the first file's; checked on its first row group."""
    name = config.columns.timestamp
    if name is None:
        return None
    first = full[0]
    group = next(i for i, rows in enumerate(first.group_rows) if rows)
    column = tables.read_columns(first.uri, first.hive, [name], [group])[name]
    where = f"{first.uri}: column '{name}'"
    column = _from_text(column, types["timestamp"], where)
    unit = base.infer_unit(column, where) if config.timestamp_unit == "auto" else config.timestamp_unit
    base.microseconds(column, unit, where)
    return unit


def _pieces(footers: list[tuple[Footer, str | None]]) -> Iterator[_Piece]:
    """Files in order; those above _TASK_BYTES by row groups."""
    for index, (footer, split) in enumerate(footers):
        scale = footer.size / max(sum(footer.group_bytes), 1)  # footers give sizes before compression
        start = row = 0
        held = 0.0
        for group, size in enumerate(footer.group_bytes):
            held += size * scale
            last = group == len(footer.group_rows) - 1
            if held >= _TASK_BYTES or last:
                groups = list(range(start, group + 1))
                yield _Piece(footer.uri, split, footer.hive, groups, (index << _ROW_BITS) + row, int(held))
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


def _read_batch(batch: pa.Table, plan: _Plan) -> Iterator[pa.Table]:
    for task in batch["pieces"].to_pylist():
        yield from read_task(task, plan)


def read_task(task: str, plan: _Plan) -> Iterator[pa.Table]:
    """The events of one of `Log.tasks`."""
    for piece in json.loads(task):
        yield _read_piece(_Piece(**piece), plan)


def _read_piece(piece: _Piece, plan: _Plan) -> pa.Table:
    """Row groups of one file in standard columns."""
    roles = _roles(plan.columns)
    columns = tables.read_columns(piece.uri, piece.hive, list(roles.values()), piece.groups)
    rows = len(columns[plan.columns.user])
    order = pa.array(np.arange(piece.order, piece.order + rows, dtype=np.int64))
    out: dict[str, Any] = {"time": order, "order": order}
    for role, name in roles.items():
        target = "time" if role == "timestamp" else role
        out[target] = _standard(columns[name], role, plan, f"{piece.uri}: column '{name}'")
    if piece.split is not None:
        out["split"] = pa.array([piece.split] * rows, pa.string())
    first = [name for name in base.STANDARD if name in out]
    return pa.table({name: out[name] for name in [*first, *(name for name in out if name not in first)]})


def _standard(column: pa.ChunkedArray, role: str, plan: _Plan, where: str) -> pa.ChunkedArray | pa.Array:
    kind = plan.types[role]
    if role in ("user", "item"):
        return base.ids(column, where, kind)
    if role == "timestamp":
        return base.microseconds(_from_text(column, kind, where), plan.unit or "order", where)
    if role in ("label", "weight"):
        return base.finite(column, role, where)
    if role == "split":
        return base.splits(column, where)
    return base.standardised(column, pa.string() if kind == pa.null() else kind, where)


def _from_text(column: pa.ChunkedArray, kind: pa.DataType, where: str) -> pa.ChunkedArray:
    """A partition of integers is read as text."""
    text = pa.types.is_string(column.type) and kind == pa.int64()
    return base.standardised(column, kind, where) if text else column
