"""Where an artefact comes from, down to the raw files, and what differs between two of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from recray import layout, storage
from recray.artifacts import (
    CHECKPOINT,
    DATASET,
    INDEX,
    REPORT,
    REPORT_VALID,
    STAGES,
    TUNE,
    artifacts_of,
    current_of,
    flatten,
)
from recray.errors import LineageError
from recray.records import CheckpointRecord, DatasetRecord, IndexRecord, ListsRecord, Record, ReportRecord, TuneRecord

# The folder of a checkpoint or an index holds records of what it was made from, too.
_KINDS: tuple[type[Record], ...] = (ListsRecord, ReportRecord, TuneRecord, IndexRecord, CheckpointRecord, DatasetRecord)
_ORDER = (REPORT, REPORT_VALID, TUNE, INDEX, CHECKPOINT, DATASET)


@dataclass(frozen=True)
class Node:
    """A record and what it was made from; without a record, a parent that is no longer where its child was made.

    Of an artefact that `recray prune` deleted, the record is left, in <run>/pruned.
    """

    id: str
    uri: str = ""
    record: Record | None = None
    parents: list[Node] = field(default_factory=list)

    @property
    def pruned(self) -> bool:
        """Whether only the record is left."""
        return layout.is_pruned(self.uri)

    def chain(self) -> Iterator[Node]:
        """This node and all that it was made from, each once."""
        seen: set[str] = set()
        waiting = [self]
        while waiting:
            node = waiting.pop(0)
            if node.id not in seen:
                seen.add(node.id)
                yield node
                waiting += node.parents

    @property
    def complete(self) -> bool:
        """Whether every record down to the raw files was found."""
        return all(node.record is not None for node in self.chain())

    def as_json(self) -> dict[str, Any]:
        body: dict[str, Any] = {"id": self.id, "uri": self.uri, "found": self.record is not None, "pruned": self.pruned}
        if self.record is not None:
            body |= {"created": self.record.created, "made_by": self.record.made_by.model_dump(mode="json")}
        if isinstance(self.record, DatasetRecord):
            body["inputs"] = [one.model_dump(mode="json") for one in self.record.inputs]
            body["fingerprint"] = self.record.fingerprint
        return body | {"parents": [parent.as_json() for parent in self.parents]}


def lineage(uri: str) -> Node:
    """The chain of the artefact in a folder, or of the last artefact in use of a run.

    Raises LineageError if the folder holds neither.
    """
    folder, record = _open(uri)
    return _node(folder, record, _Finder(folder))


def _open(uri: str) -> tuple[str, Record]:
    for kind in _KINDS:
        if storage.exists(storage.join(uri, kind.file_name())):
            return uri, kind.read(uri)
    named = current_of(uri)
    for stage in _ORDER:
        if stage.name in named:
            folder = storage.join(uri, stage.name, named[stage.name])
            return folder, stage.record.read(folder)
    raise LineageError(f"{uri} holds no artefact and no run: give the folder of one, as `recray runs` lists them")


class _Finder:
    """Finds records by id: in the run, and where a record says that its parents are."""

    def __init__(self, folder: str) -> None:
        self._known: dict[str, tuple[str, Record]] = {}
        self._run = folder.rstrip("/").rpartition("/")[0].rpartition("/")[0]
        for stage in STAGES if self._run else ():
            for artifact in artifacts_of(storage.join(self._run, stage.name), stage):
                if artifact.complete():
                    self._known[artifact.record.id] = (artifact.uri, artifact.record)

    def find(self, child: Record, id_: str) -> tuple[str, Record] | None:
        for name in ("dataset_uri", "checkpoint_uri"):
            uri = getattr(child, name, None)
            if id_ not in self._known and uri:
                kind = DatasetRecord if name == "dataset_uri" else CheckpointRecord
                if storage.exists(storage.join(uri, kind.file_name())):
                    record = kind.read(uri)
                    self._known[record.id] = (uri, record)
        return self._known.get(id_) or self._pruned(id_)

    def _pruned(self, id_: str) -> tuple[str, Record] | None:
        if not self._run or not re.fullmatch(r"[a-z]+-[0-9a-f]{12}", id_):
            return None
        uri = storage.join(self._run, layout.PRUNED, id_)
        for kind in _KINDS:
            if storage.exists(storage.join(uri, kind.file_name())):
                return uri, kind.read(uri)
        return None


def _node(uri: str, record: Record, finder: _Finder) -> Node:
    parents = []
    # A dataset's first parent is the hash of its input files, which its record lists.
    for id_ in record.parents[1:] if isinstance(record, DatasetRecord) else record.parents:
        found = finder.find(record, id_)
        parents.append(_node(*found, finder) if found is not None else Node(id_))
    return Node(record.id, uri, record, parents)


def render(node: Node) -> str:
    """One line a record, indented by depth, with the raw files last; a record is described where it first appears."""
    lines: list[str] = []
    seen: set[str] = set()

    def add(one: Node, depth: int) -> None:
        indent = "  " * depth
        if one.id in seen:
            lines.append(f"{indent}{one.id}  (above)")
            return
        seen.add(one.id)
        if one.record is None:
            lines.append(f"{indent}{one.id}  not found: deleted, or in another run")
            return
        lines.append(
            f"{indent}{one.id}  {one.record.created}  {_code(one.record)}  {'pruned' if one.pruned else one.uri}"
        )
        for parent in one.parents:
            add(parent, depth + 1)
        if isinstance(one.record, DatasetRecord):
            for file in one.record.inputs:
                count = f"{file.files:,} files, " if file.files > 1 else ""
                lines.append(f"{indent}  {file.uri}  {count}{file.bytes:,} bytes  {file.known_by} {file.state[:12]}")
            if not one.record.inputs:
                lines.append(f"{indent}  no input files  hash {one.record.fingerprint[:12]}")

    add(node, 0)
    return "\n".join(lines)


def _code(record: Record) -> str:
    """'recray 0.1.0 at 3f2a91c0+', where + stands for changes that are not committed."""
    git = record.made_by.project or record.made_by.package
    return f"recray {record.recray_version}" + (f" at {git.commit[:8]}{'+' * git.dirty}" if git is not None else "")


def diff(a: str, b: str) -> dict[str, dict[str, tuple[Any, Any]]]:
    """What differs between two artefacts, or runs: section -> name -> (value of a, value of b).

    Sections: "configuration" (keys that decide a result, of the whole chains), "data" (input files, counts),
    "code" (commits, versions, machine) and "result" (figures of the artefacts themselves).

    Raises LineageError if a folder holds nothing, or if the artefacts are of different stages.
    """
    one, other = lineage(a), lineage(b)
    if type(one.record) is not type(other.record):
        raise LineageError(
            f"{one.id} and {other.id} are of different stages: give two artefacts of one stage, or two runs"
        )
    found = {}
    for section, of in (("configuration", _keys), ("data", _data), ("code", _code_of), ("result", _result)):
        left, right = of(one), of(other)
        names = sorted({*left, *right})
        differ = {
            name: (left.get(name), right.get(name)) for name in names if not _same(left.get(name), right.get(name))
        }
        found[section] = differ
    return found


def _same(a: Any, b: Any) -> bool:
    return bool(a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)))


def _keys(node: Node) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for one in node.chain():
        keys |= one.record.keys if one.record is not None else {}
    return keys


def _data(node: Node) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for one in node.chain():
        if isinstance(one.record, DatasetRecord):
            values["fingerprint"] = one.record.fingerprint
            values |= {f"counts.{name}": count for name, count in one.record.counts.items()}
            values |= {file.uri: f"{file.bytes:,} bytes, {file.state[:12]}" for file in one.record.inputs}
    return values


def _code_of(node: Node) -> dict[str, Any]:
    return flatten(node.record.made_by.model_dump(mode="json")) if node.record is not None else {}


def _result(node: Node) -> dict[str, Any]:
    """The figures of a record, and the hash of the weights. Its id differs already where the run has another name."""
    record = node.record
    values: dict[str, Any] = {}
    if isinstance(record, ReportRecord):
        values |= {
            f"{system}.{name}": interval.value
            for system, found in record.metrics.items()
            for name, interval in found.items()
        }
    elif isinstance(record, CheckpointRecord):
        values |= {
            record.metric: record.value,
            "best_epoch": record.best_epoch,
            "epoch": record.epoch,
            "rows": record.rows,
            "weights": getattr(record.files.get("model.safetensors"), "sha256", None),
        }
    elif isinstance(record, IndexRecord):
        values |= {"factory": record.factory, "recall": record.recall, "setting": record.setting, "bytes": record.bytes}
    elif isinstance(record, TuneRecord):
        best = next((trial for trial in record.trials if trial.number == record.winner), None)
        values |= {"winner": best.values if best else None, record.metric: best.best if best else None}
    elif isinstance(record, DatasetRecord):
        values |= {"num_items": record.num_items, "num_users": record.num_users}
    return values


def render_diff(found: dict[str, dict[str, tuple[Any, Any]]]) -> str:
    """A table a section: name, value of the first, value of the second."""
    lines = []
    for section, values in found.items():
        lines.append(section if values else f"{section}: the same")
        width = max(map(len, values), default=0)
        lines += [f"  {name:{width}}  {_shown(old)} -> {_shown(new)}" for name, (old, new) in values.items()]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
