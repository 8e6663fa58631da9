"""What a run serves: served.json, apart from current.json, which names what was made last.

    {"history": [{"checkpoint": "77b0e1d2", "index": "90ab12cd", "dataset": "3f2a91c0", "at": ..., ...}, ...]}

The last entry that was not withdrawn is served, and the one before it is what a rollback returns to. A training changes
current.json only; `recray promote` and `recray rollback` change this file, each in one atomic write.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from recray import locks, sealed, storage
from recray.errors import LineageError
from recray.records import Part

_FILE = "served.json"


class Served(Part):
    """The artefacts of one promotion, and how lists are made from them."""

    checkpoint: str  # identities: names of folders below <run>/<stage>/
    index: str | None  # None: exact search
    dataset: str
    retrieval: dict[str, Any]  # the sections of the configuration that was promoted
    evaluation: dict[str, Any]
    at: str  # ISO time of the promotion
    forced: bool = False  # promoted in spite of its checks
    withdrawn: str = ""  # ISO time of the rollback; empty if there was none

    def same_as(self, other: Served) -> bool:
        """Whether both serve the same lists."""
        names = ("checkpoint", "index", "dataset", "retrieval", "evaluation")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    @property
    def artifacts(self) -> set[tuple[str, str]]:
        """(stage, identity) of its artefacts."""
        found = {("checkpoint", self.checkpoint), ("dataset", self.dataset)}
        return found | ({("index", self.index)} if self.index else set())


def history_of(run_uri: str) -> list[Served]:
    """All promotions of a run, oldest first. Raises LineageError for a damaged file."""
    uri = storage.join(run_uri, _FILE)
    if not storage.exists(uri):
        return []
    remedy = "delete it, and run `recray promote` again"
    try:
        return [Served.model_validate(one) for one in sealed.read(uri, remedy)["history"]]
    except (KeyError, TypeError, ValidationError):
        raise LineageError(f"{uri} is not a list of promotions of recray: {remedy}") from None


def standing(run_uri: str) -> list[Served]:
    """Promotions that were not withdrawn, oldest first: the last one is served."""
    return [one for one in history_of(run_uri) if not one.withdrawn]


def served_of(run_uri: str) -> Served | None:
    """What a run serves; None if nothing was promoted."""
    found = standing(run_uri)
    return found[-1] if found else None


def kept_of(run_uri: str) -> set[tuple[str, str]]:
    """(stage, identity) of what is served, and of what a rollback returns to."""
    return {artifact for one in standing(run_uri)[-2:] for artifact in one.artifacts}


def promote(run_uri: str, candidate: Served) -> None:
    """Serve a candidate from now on."""
    with locks.exclusive(storage.join(run_uri, _FILE)):
        _write(run_uri, [*history_of(run_uri), candidate])


def rollback(run_uri: str) -> Served:
    """Withdraw what is served, and serve what was served before it, which is returned.

    Raises LineageError if there is nothing to return to.
    """
    with locks.exclusive(storage.join(run_uri, _FILE)):
        history, before = history_of(run_uri), standing(run_uri)
        if len(before) < 2:
            raise LineageError(
                f"{run_uri} {'serves its first promotion' if before else 'serves nothing'}: there is nothing to return to"
            )
        last, previous = before[-1], before[-2]
        for stage, identity in sorted(previous.artifacts - {("dataset", previous.dataset)}):
            if not storage.exists(storage.join(run_uri, stage, identity, f"{stage}.json")):
                raise LineageError(f"{run_uri} was served with {stage} {identity}, which is no longer there")
        at = history.index(last)
        history[at] = last.model_copy(update={"withdrawn": now()})
        _write(run_uri, history)
        return previous


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write(run_uri: str, history: list[Served]) -> None:
    sealed.write(storage.join(run_uri, _FILE), {"history": [one.model_dump(mode="json") for one in history]})
