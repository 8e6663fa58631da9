"""`recray verify`: read every file of a run again, and compare it with what its record says was written."""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from recray import folders, layout, sealed, storage
from recray.errors import LineageError, StorageError
from recray.records import (
    CheckpointRecord,
    DatasetRecord,
    IndexRecord,
    ListsRecord,
    Record,
    ReportRecord,
    TrialRecord,
    TuneRecord,
)

_THREADS = 16
_KINDS: dict[str, type[Record]] = {
    kind.file_name(): kind
    for kind in (CheckpointRecord, DatasetRecord, IndexRecord, ListsRecord, ReportRecord, TrialRecord, TuneRecord)
}
_SEALED = ("identity.json", "current.json", "point.json")
# What belongs to no record: folders, the link to what is in use, files of Ray, locks, and what was never completed.
_LOOSE = re.compile(
    r".*/|(.*/)?current@|(.*/)?ray/.*|tensorboard/.*|(.*/)?_sorted/.*|.*\.(lock|part)|(.*/)?(stop|_begun\.json|(tune|report)\.html)"
)


@dataclass(frozen=True)
class Verified:
    """What was found of one artefact, one saved epoch, or of the files that belong to none."""

    uri: str
    kind: str  # "dataset", "checkpoint", "index", "report", "tune", "trial", "lists"; "" for files of no artefact
    files: int  # compared
    bytes: int
    problems: list[str]  # each names a file

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def verify(uri: str) -> list[Verified]:
    """Compare all files below a run, an artefact or a folder of lists with their records.

    Raises LineageError if there is no record.
    """
    names = folders.everything(uri)
    known = set(names)
    seen: set[str] = set()
    found, unfinished = [], []
    for name in sorted(names):
        folder, _, file = name.rpartition("/")
        if file in _SEALED:
            seen.add(name)
            if problem := _sealed(storage.join(uri, name)):
                found.append(Verified(storage.join(uri, name), "", 1, 0, [problem]))
        if file == "identity.json" and not any(_inside(folder, record) in known for record in _KINDS):
            unfinished.append(_inside(folder, ""))
        kind = _KINDS.get(file)
        # A checkpoint keeps a copy of its dataset's record.
        if kind is None or (kind is DatasetRecord and _inside(folder, CheckpointRecord.file_name()) in known):
            continue
        at = storage.join(uri, folder) if folder else uri
        result, own = _compare(at, kind, files=not layout.is_pruned(at))
        seen |= {name, *(_inside(folder, one) for one in own)}
        found.append(result)
    if not found:
        raise LineageError(f"{uri} holds no record of recray: give the folder of a run, of an artefact or of lists")
    foreign = [
        name
        for name in sorted(known - seen)
        if not _LOOSE.fullmatch(name) and not any(name.startswith(folder) for folder in unfinished)
    ]
    if foreign:
        problems = [f"{storage.join(uri, name.rstrip('@'))} is in no record" for name in foreign]
        found.append(Verified(uri, "", len(foreign), 0, problems))
    return found


def _inside(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _compare(folder: str, kind: type[Record], files: bool) -> tuple[Verified, Iterable[str]]:
    """One record and its files; last their names. files: whether there are any: of what was pruned only the record is left."""
    name = kind.file_name().removesuffix(".json").lstrip("_")
    try:
        record = kind.read(folder)
    except (LineageError, StorageError) as error:
        return Verified(folder, name, 1, 0, [str(error)]), ()
    if not files:
        return Verified(folder, name, 1, 0, []), ()
    present = folders.contents(folder, record.files)

    def problem(file: str) -> str | None:
        uri, size = storage.join(folder, file), present.get(file)
        if size is None:
            return f"{uri} is missing"
        if size is ...:
            return f"{uri} is a link or a folder"
        try:
            record.files[file].check(uri)
        except StorageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(_THREADS) as pool:
        problems = [one for one in pool.map(problem, record.files) if one]
    size = sum(digest.bytes for digest in record.files.values())
    return Verified(folder, name, 1 + len(record.files), size, problems), record.files


def _sealed(uri: str) -> str | None:
    try:
        sealed.read(uri, "run its stage again")
    except (LineageError, StorageError) as error:
        return str(error)
    return None
