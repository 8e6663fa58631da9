"""What an output folder holds: `recray runs` lists the runs and their artefacts, `recray prune` deletes old ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from recray import folders, layout, log, served, storage
from recray.artifacts import STAGES, Artifact, artifacts_of, current_of
from recray.errors import LineageError
from recray.records import CheckpointRecord, DatasetRecord, IndexRecord, Record, ReportRecord, TuneRecord


@dataclass(frozen=True)
class Entry:
    """One artefact of a run."""

    run: str  # name of the run
    stage: str
    identity: str
    in_use: bool
    served: bool
    complete: bool
    summary: str  # e.g. "ndcg@10 0.2215 at epoch 5"
    created: str  # ISO time; empty for an artefact that is not complete
    bytes: int
    uri: str
    page: str = ""  # report.html, tune.html

    @property
    def age_seconds(self) -> float | None:
        """Seconds since it was completed."""
        if not self.created:
            return None
        return (datetime.now(UTC) - datetime.fromisoformat(self.created)).total_seconds()

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "age_seconds": self.age_seconds}


def list_runs(output: str) -> list[Entry]:
    """Artefacts of all runs below an output folder, by run and stage, newest first."""
    return [entry for name in storage.list_folders(output) for entry in list_artifacts(storage.join(output, name))]


def list_artifacts(run_uri: str) -> list[Entry]:
    """Artefacts of one run, by stage, newest first."""
    named, pointer = current_of(run_uri), _served(run_uri)
    return [_entry(run_uri, one, named, pointer) for one in _artifacts(run_uri)]


def _served(run_uri: str) -> set[tuple[str, str]]:
    one = served.served_of(run_uri)
    return one.artifacts if one is not None else set()


def _artifacts(run_uri: str) -> Iterator[Artifact[Record]]:
    for stage in STAGES:
        found = artifacts_of(storage.join(run_uri, stage.name), stage)
        yield from sorted(found, key=lambda one: one.record.created if one.complete() else "", reverse=True)


def _entry(run_uri: str, artifact: Artifact[Record], named: dict[str, str], pointer: set[tuple[str, str]]) -> Entry:
    complete = artifact.complete()
    return Entry(
        run=run_uri.rpartition("/")[2],
        stage=artifact.stage.name,
        identity=artifact.identity,
        in_use=named.get(artifact.stage.name) == artifact.identity,
        served=(artifact.stage.name, artifact.identity) in pointer,
        complete=complete,
        summary=_summary(artifact.record) if complete else "not complete",
        created=artifact.record.created if complete else "",
        bytes=folders.size(artifact.uri),
        uri=artifact.uri,
        page=next(
            (uri for name in ("report.html", "tune.html") if storage.exists(uri := storage.join(artifact.uri, name))),
            "",
        ),
    )


def _summary(record: Record) -> str:
    if isinstance(record, DatasetRecord):
        return f"{sum(record.counts[f'events_{split}'] for split in record.shards):,} events"
    if isinstance(record, CheckpointRecord):
        return f"{record.metric} {record.value:.4f} at epoch {record.epoch}"
    if isinstance(record, IndexRecord):
        return f"{record.factory}, recall@{record.k} {record.recall:.4f}"
    if isinstance(record, ReportRecord):
        name = next(iter(record.metrics["model"]))
        return f"{name} {record.metrics['model'][name].value:.4f} ({record.split})"
    if isinstance(record, TuneRecord):
        return f"{len(record.trials)} trials, {record.metric}"
    return ""


def prunable(run_uri: str, keep: int) -> list[Entry]:
    """Artefacts that `prune` would delete.

    Kept are those in use, what is served and what a rollback returns to, the `keep` newest complete ones of each stage, and
    what any kept one, or any artefact of another run in the same output folder, was made from. An artefact that is not
    complete is deleted only where a complete one of its stage is newer: it may still be resumed otherwise.
    """
    named, artifacts = current_of(run_uri), list(_artifacts(run_uri))
    standing = served.kept_of(run_uri)
    kept: list[Artifact[Record]] = []
    for stage in STAGES:
        own = [one for one in artifacts if one.stage is stage]
        complete = [one for one in own if one.complete()]
        # Times are in seconds: of several of one second the one in use is the newest.
        complete.sort(key=lambda one: (one.record.created, named.get(one.stage.name) == one.identity), reverse=True)
        kept += complete[:keep]
        kept += [one for one in complete[keep:] if named.get(stage.name) == one.identity]
        kept += [one for one in complete[keep:] if (stage.name, one.identity) in standing]
        newest = complete[0].record.created if complete else ""
        kept += [one for one in own if not one.complete() and one.created >= newest]
    output, _, name = run_uri.rpartition("/")
    others = [other for other in storage.list_folders(output) if other != name]
    # Other runs may share this run's dataset, or have a ranker of this run behind their retriever.
    outside = {parent for other in others for one in _artifacts(storage.join(output, other)) for parent in one.inputs}
    needed = outside | _needed(kept)
    # Inputs of inputs: an index needs its checkpoint, which needs its dataset.
    for _ in STAGES:
        kept += [one for one in artifacts if one not in kept and one.complete() and one.record.id in needed]
        needed = _needed(kept)
    return [_entry(run_uri, one, named, set()) for one in artifacts if one not in kept]


def _needed(kept: list[Artifact[Record]]) -> set[str]:
    """Ids that artefacts cannot be used without.

    The second input of a checkpoint, which it started from, is in its weights, and that of a dataset, which it extends, in
    its files.
    """
    first = ("checkpoint", "dataset")
    return {parent for one in kept for parent in (one.inputs[:1] if one.stage.name in first else one.inputs)}


def prune(run_uri: str, keep: int) -> list[Entry]:
    """Delete what `prunable` names, and only what recray wrote there. Returns what was deleted.

    Records stay in <run>/pruned/<id>, so that lineage still leads from what was made of them to the raw files.
    """
    deleted = prunable(run_uri, keep)
    kinds = {stage.name: stage.record for stage in STAGES}
    for entry in deleted:
        with contextlib.suppress(LineageError):  # of an artefact that is not complete, or is damaged
            record = kinds[entry.stage].read(entry.uri)
            name = record.file_name()
            storage.copy_file(storage.join(entry.uri, name), storage.join(run_uri, layout.PRUNED, record.id, name))
        layout.clear(entry.uri, layout.WRITTEN[entry.stage])
        log.info("prune", f"deleted {entry.uri}", event="deleted", values=entry.as_json())
    return deleted
