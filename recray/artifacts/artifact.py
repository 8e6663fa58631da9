"""One artefact: the folder of an identity, what is written in it first, and finding those of a run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Generic, TypeVar

from recray import folders, layout, sealed, storage
from recray.artifacts.stage import Stage
from recray.errors import LineageError
from recray.records import Record

R = TypeVar("R", bound=Record, covariant=True)


_IDENTITY = folders.MARK
CURRENT = "current.json"
_NAME = re.compile("[0-9a-f]{8}")


@dataclass(frozen=True)
class Artifact(Generic[R]):
    """One artefact of a stage, complete or not."""

    stage: Stage[R]
    uri: str
    identity: str
    keys: dict[str, Any]
    inputs: list[str]  # ids of the records that it was made from; of a dataset the hash of the log
    created: str = ""  # ISO time at which it was begun

    def complete(self) -> bool:
        """Whether its record is there: it is written last."""
        return storage.exists(storage.join(self.uri, self.stage.record.file_name()))

    @cached_property
    def record(self) -> R:
        """Raises LineageError where it is not complete."""
        return self.stage.record.read(self.uri)

    @property
    def lineage(self) -> dict[str, Any]:
        """The fields that its record takes from here."""
        return {"identity": self.identity, "keys": self.keys, "parents": self.inputs}

    def mark(self) -> None:
        """Write down what the folder is for, before anything else is in it."""
        body = {
            "stage": self.stage.name,
            "identity": self.identity,
            "keys": self.keys,
            "inputs": self.inputs,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        sealed.write(storage.join(self.uri, _IDENTITY), body)

    def clear(self) -> None:
        """Delete what recray wrote in its folder. Does nothing to a folder that recray did not mark."""
        if read_mark(self.uri) is not None:
            layout.clear(self.uri, layout.WRITTEN[self.stage.name])


def current_of(run_uri: str) -> dict[str, str]:
    """Stage -> identity of the artefacts that a run names as in use; empty where it names none."""
    uri = storage.join(run_uri, CURRENT)
    if not storage.exists(uri):
        return {}
    named = sealed.read(uri, "delete it, and run the stages again: what is up to date does no work")
    if not all(isinstance(one, str) and _NAME.fullmatch(one) for one in named.values()):
        raise LineageError(f"{uri} does not name artefacts: delete it, and run the stages again")
    return named


def in_use(run_uri: str, stage: Stage[R]) -> Artifact[R]:
    """The artefact of a stage that the run at `run_uri` names as in use, or the one in the folder `run_uri` itself.

    Raises LineageError where there is none.
    """
    uri = run_uri
    if not storage.exists(storage.join(run_uri, stage.record.file_name())):
        named = current_of(run_uri).get(stage.name)
        if named is None:
            raise LineageError(
                f"{run_uri} holds no {stage.name}: give the folder of a run that `recray {stage.verb}` made"
            )
        uri = storage.join(run_uri, stage.name, named)
    record = stage.record.read(uri)
    return Artifact(stage, uri, record.identity, record.keys, record.parents)


def artifacts_of(root: str, stage: Stage[R]) -> list[Artifact[R]]:
    """The artefacts of a stage in a folder, complete or not. Folders that recray did not mark are left out."""
    found = []
    for name in storage.list_folders(root):
        uri = storage.join(root, name)
        body = read_mark(uri)
        if name != "current" and body is not None and body["stage"] == stage.name and body["identity"] == name:
            found.append(Artifact(stage, uri, name, body["keys"], body["inputs"], body["created"]))
    return found


def read_mark(uri: str) -> dict[str, Any] | None:
    file = storage.join(uri, _IDENTITY)
    if not storage.exists(file):
        return None
    remedy = f"delete the folder {uri}, and run its stage again"
    body = sealed.read(file, remedy)
    if not {"stage", "identity", "keys", "inputs", "created"} <= body.keys():
        raise LineageError(f"{file} is damaged: {remedy}")
    return body
