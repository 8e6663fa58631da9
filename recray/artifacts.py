"""A run on disk: where its artefacts lie, which are complete, and which are in use.

    runs/news/                              <output>/<name>
        current.json                        {"dataset": "3f2a91c0", "checkpoint": "77b0e1d2", ...}: what is in use
        dataset/3f2a91c0/                   an artefact: identity.json first, then its files, its record last
        dataset/current -> 3f2a91c0         on local disks, for people and their scripts
        checkpoint/77b0e1d2/  index/...  report/...  report-valid/...  tune/...

The name of an artefact's folder is its *identity*: a hash of the values of the configuration keys
that decide its result, and of the ids of its inputs. One rule follows for all stages: an artefact
is up to date if the folder of its identity is complete. Training with `model.dim = 8` after 64 makes
a second folder and leaves the first one alone; setting 64 again finds it. An artefact never changes
once its record is written, and publishing it is one small write of current.json.

This module knows the paths below a run; no other module joins them. (It is not called `run`, since
`recray.run` is the function that runs all stages.)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar

from recray import folders, layout, locks, log, registry, sealed, storage
from recray.config import Config
from recray.errors import LineageError
from recray.metrics import parse
from recray.records import CheckpointRecord, DatasetRecord, IndexRecord, Record, ReportRecord, TuneRecord
from recray.served import served_of

R = TypeVar("R", bound=Record, covariant=True)
Split = Literal["test", "valid"]

_IDENTITY = folders.MARK
_CURRENT = "current.json"
_NAME = re.compile("[0-9a-f]{8}")


@dataclass(frozen=True)
class Stage(Generic[R]):
    """What a stage is called and which configuration keys decide its result.

    keys, except: dotted keys or sections of the configuration. Every key of the configuration is claimed by a stage or
    listed in NO_RESULT.
    """

    name: str  # folder below the run, and key in current.json
    verb: str  # the command that makes it
    record: type[R]
    keys: tuple[str, ...]
    excluded: tuple[str, ...] = ()
    version: int = 1  # of the files that it writes: those of an older one are not up to date

    def values(self, config: Config) -> dict[str, Any]:
        """Dotted key -> value, of the keys that decide this stage's result."""
        flat = flatten(config.model_dump(mode="json"))
        kept = {key: value for key, value in flat.items() if _below(key, self.keys) and not _below(key, self.excluded)}
        if self.name in ("checkpoint", "tune") and config.model.family == "ranker":
            # They define how lists are ranked, and a ranker is selected by how it predicts clicks.
            kept = {key: value for key, value in kept.items() if not _below(key, ("evaluation",))}
        return kept | _plugin_files(config, kept)


def _plugin_files(config: Config, values: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of the files of plug-ins outside the package that these keys name: an edited model is another model."""
    found = {}
    for key, kind in _PLUGINS.items():
        given = values.get(key, [])
        for name in given if isinstance(given, list) else [given]:
            name = parse(name)[0] if kind == "metric" else name
            if (digest := registry.file_hash(kind, name, config.run.plugins)) is not None:
                found[f"{key}: file of {name}"] = digest
    return found


# Keys whose values name plug-ins.
_PLUGINS: dict[str, registry.Kind] = {
    "data.source": "source",
    "model.name": "model",
    "loss.name": "loss",
    "training.metric": "metric",
    "evaluation.metrics": "metric",
    "evaluation.baselines": "baseline",
}
DATASET = Stage("dataset", "prepare", DatasetRecord, ("data", "run.seed"), version=2)
CHECKPOINT = Stage(
    "checkpoint",
    "train",
    CheckpointRecord,
    # Selection ranks validation users as evaluation does.
    ("model", "loss", "optim", "training", "run.seed", "evaluation.filter_seen", "evaluation.queries"),
    excluded=("loss.chunk_size", "training.resume", "training.compile", "training.save_every"),
)
INDEX = Stage(
    "index",
    "index",
    IndexRecord,
    ("retrieval", "evaluation.queries", "run.seed"),
    # The order of what the index finds is decided after it.
    excluded=("retrieval.ranker", "retrieval.item_knn_weight"),
)
_REPORT_KEYS = ("evaluation", "retrieval.ranker", "retrieval.item_knn_weight", "retrieval.k", "run.seed")
REPORT = Stage("report", "evaluate", ReportRecord, _REPORT_KEYS, excluded=("evaluation.batch_size",))
REPORT_VALID = Stage("report-valid", "evaluate", ReportRecord, _REPORT_KEYS, excluded=("evaluation.batch_size",))
# How much of a search is done, how much of it at a time, and what is done with the best may change when it is resumed.
_TUNE_FREE = tuple(
    f"tune.{key}"
    for key in ("trials", "seconds", "epochs", "concurrent", "cpus_per_trial", "gpus_per_trial", "top", "seeds")
)
TUNE = Stage(
    "tune",
    "tune",
    TuneRecord,
    ("tune", *CHECKPOINT.keys),
    # Trials only select: the winner's own run refits.
    excluded=(*_TUNE_FREE, *CHECKPOINT.excluded, "training.refit"),
)
STAGES: tuple[Stage[Record], ...] = (DATASET, CHECKPOINT, INDEX, REPORT, REPORT_VALID, TUNE)


def report_stage(split: str) -> Stage[ReportRecord]:
    """The stage of the report on a split, "test" or "valid"."""
    return REPORT if split == "test" else REPORT_VALID


# Keys that change where and how fast work is done, never its result.
NO_RESULT = (
    "run.name",
    "run.output",
    "run.dataset",
    "run.keep",
    "run.plugins",
    "scaling",
    "loss.chunk_size",
    "training.resume",
    "training.compile",
    "training.save_every",
    "evaluation.batch_size",
    "promotion",
    "report",
    "tracking",
    *_TUNE_FREE,
)


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
        if _read_identity(self.uri) is not None:
            layout.clear(self.uri, layout.WRITTEN[self.stage.name])


class Run:
    """The run of a configuration: `<output>/<name>`."""

    def __init__(self, config: Config) -> None:
        self.config, self.uri = config, config.run_uri

    # What a stage uses ---------------------------------------------------------------------------------------------

    def artifact(self, stage: Stage[R], inputs: Sequence[str]) -> Artifact[R]:
        """The artefact of this configuration and these inputs (ids of records), complete or not.

        Raises LineageError where the folder of that identity holds something else.
        """
        keys = stage.values(self.config)
        identity = identity_of(keys, inputs, stage.version)
        root = self._dataset_root if stage.name == "dataset" else storage.join(self.uri, stage.name)
        made = Artifact(stage, storage.join(root, identity), identity, keys, list(inputs))
        found = _read_identity(made.uri)
        if found is not None and (found["keys"], found["inputs"]) != (keys, made.inputs):
            raise LineageError(f"{made.uri} holds an artefact of another configuration: delete that folder")
        return made

    @contextlib.contextmanager
    def making(self, artifact: Artifact[R], anew: bool = False) -> Iterator[bool]:
        """`begin`; inside the block no other process makes the artefact. Raises StorageError that names the one that does."""
        if artifact.complete() and not anew:
            yield self.begin(artifact)
            return
        with locks.exclusive(artifact.uri):
            yield self.begin(artifact, anew)

    def begin(self, artifact: Artifact[R], anew: bool = False) -> bool:
        """Whether the artefact has to be made. Says why, and marks its folder; what is up to date is published. Only the
        process that makes it may call this: what a killed one has half written is deleted.

        anew: delete what is there of it. Raises StorageError if a folder that recray did not mark is not empty.
        """
        if _read_identity(artifact.uri) is None:
            layout.refuse_foreign(artifact.uri, layout.NOTHING)
        elif anew:
            artifact.clear()
        stage = artifact.stage
        values = {"identity": artifact.identity, "uri": artifact.uri}
        if artifact.complete():
            log.info(stage.verb, f"up to date ({artifact.identity})", event="up_to_date", values=values)
            self.publish(artifact)
            return False
        if _read_identity(artifact.uri) is None:
            why = self._difference(artifact)
            log.info(stage.verb, f"new artefact {artifact.identity}{why}", event="new_artifact", values=values)
            artifact.mark()
        else:
            layout.clear_half_written(artifact.uri, layout.WRITTEN[stage.name])
        return True

    def publish(self, artifact: Artifact[Record]) -> None:
        """Name a complete artefact as the one in use."""
        stage = artifact.stage.name
        if not artifact.uri.startswith(f"{self.uri}/"):
            return  # a dataset that another run owns
        file, link = storage.join(self.uri, _CURRENT), storage.join(self.uri, stage, "current")
        with locks.exclusive(storage.join(self.uri, "current")):  # another stage may be published at the same time
            storage.delete_parts(file)
            storage.delete_parts(link)
            named = self.current()
            if named.get(stage) != artifact.identity:
                sealed.write(file, {**named, stage: artifact.identity})
            storage.link(link, artifact.identity)

    def discard(self, artifact: Artifact[Record]) -> None:
        """Delete an artefact that could not be completed, and the folder of its stage if nothing else is in it."""
        artifact.clear()
        storage.delete_empty_folder(artifact.uri.rpartition("/")[0])

    def current(self) -> dict[str, str]:
        """Stage -> identity of the artefact in use."""
        return current_of(self.uri)

    # What later stages look for ------------------------------------------------------------------------------------

    def dataset(self) -> Artifact[DatasetRecord]:
        """The prepared dataset of this [data] and run.seed. The raw log is not read: after it changed, run `recray prepare`.

        Raises LineageError where there is none, and names the keys that differ from the nearest one.
        """
        wanted = DATASET.values(self.config)
        fixed = self.config.run.dataset
        if fixed and storage.exists(storage.join(fixed, DatasetRecord.file_name())):
            record = DatasetRecord.read(fixed)
            if record.keys != wanted:
                raise LineageError(
                    f"run.dataset = {fixed} was prepared with other values: {differences(record.keys, wanted)}; "
                    f"use those, or leave run.dataset out"
                )
            return Artifact(DATASET, fixed, record.identity, record.keys, record.parents)
        found = [
            one
            for one in artifacts_of(self._dataset_root, DATASET)
            if one.keys == wanted
            and one.identity == identity_of(one.keys, one.inputs, DATASET.version)
            and one.complete()
        ]
        if not found:
            self._refuse(DATASET, self._dataset_root, wanted)
        in_use = current_of(self._dataset_root.rpartition("/")[0]).get("dataset")
        # The same configuration has several where the log has grown.
        return max(found, key=lambda one: (one.identity == in_use, one.record.created))

    def dataset_of(self, model: CheckpointRecord) -> Artifact[DatasetRecord]:
        """The prepared dataset that a checkpoint was trained on. After the log has grown it is not that of `dataset()`.

        Raises LineageError if it is no longer there.
        """
        fixed = self.config.run.dataset
        if fixed and storage.exists(storage.join(fixed, DatasetRecord.file_name())):
            record = DatasetRecord.read(fixed)
            found = [Artifact(DATASET, fixed, record.identity, record.keys, record.parents)]
        else:
            found = [one for one in artifacts_of(self._dataset_root, DATASET) if one.complete()]
        for one in found:
            if one.record.id in model.parents:
                return one
        raise LineageError(
            f"checkpoint {model.identity} was trained on {model.parents[0]}, a dataset that is no longer in "
            f"{self._dataset_root}: give the folder of its run, or train again"
        )

    def checkpoint(self) -> Artifact[CheckpointRecord]:
        """The trained model of this configuration. Raises LineageError where there is none."""
        artifact = self.artifact(CHECKPOINT, self.checkpoint_inputs(self.dataset().record.id))
        if not artifact.complete():
            self._refuse(CHECKPOINT, storage.join(self.uri, "checkpoint"), artifact.keys)
        return artifact

    def checkpoint_inputs(self, dataset_id: str) -> list[str]:
        """Ids of what a checkpoint of this dataset is made from: the dataset, and the checkpoint that it starts from.

        Raises LineageError if training.start_from names a folder without a checkpoint, or this run.
        """
        start = self.config.training.start_from
        if start is None:
            return [dataset_id]
        if start.rstrip("/") == self.uri:
            raise LineageError(f"training.start_from = '{start}' is the run itself: write 'previous'")
        if start != "previous":
            return [dataset_id, in_use(start, CHECKPOINT).record.id]
        keys, found = CHECKPOINT.values(self.config), artifacts_of(storage.join(self.uri, CHECKPOINT.name), CHECKPOINT)
        complete = {one.record.id: one for one in found if one.complete()}
        # The same command finds what it made, or has begun, on this dataset.
        begun = [
            one
            for one in found
            if (one.inputs[0], one.keys) == (dataset_id, keys)
            and (one.complete() or complete.keys() >= {*one.inputs[1:]})
        ]
        if begun:
            return max(begun, key=lambda one: (one.complete(), one.created)).inputs
        served, named = served_of(self.uri), self.current().get(CHECKPOINT.name)
        serving = None if served is None else served.checkpoint
        others = [
            one
            for one in complete.values()
            if one.inputs[0] != dataset_id and not any(_below(key, ("model",)) for key in _changed(one.keys, keys))
        ]
        best = max(others, key=lambda o: (o.identity == serving, o.identity == named, o.record.created), default=None)
        return [dataset_id] if best is None else [dataset_id, best.record.id]

    def start_of(self, inputs: Sequence[str]) -> Artifact[CheckpointRecord] | None:
        """The checkpoint that `checkpoint_inputs` names; None where training starts from scratch.

        Raises LineageError if it is no longer there.
        """
        start = self.config.training.start_from
        if start is None or len(inputs) < 2:
            return None
        if start != "previous":
            return in_use(start, CHECKPOINT)
        for one in artifacts_of(storage.join(self.uri, CHECKPOINT.name), CHECKPOINT):
            if one.complete() and one.record.id == inputs[1]:
                return one
        raise LineageError(f"{inputs[1]}, which this training starts from, is no longer in {self.uri}: run it again")

    def index_artifact(self) -> Artifact[IndexRecord]:
        """The index of this configuration's checkpoint, complete or not."""
        return self.artifact(INDEX, [self.checkpoint().record.id, self.dataset().record.id])

    def index(self) -> Artifact[IndexRecord] | None:
        """The index of this configuration's checkpoint; None where there is none."""
        artifact = self.index_artifact()
        return artifact if artifact.complete() else None

    # ---------------------------------------------------------------------------------------------------------------

    @property
    def _dataset_root(self) -> str:
        """The folder whose folders are prepared datasets."""
        return self.config.run.dataset or storage.join(self.uri, "dataset")

    def _difference(self, artifact: Artifact[R]) -> str:
        """What differs from the artefact in use, for the log."""
        named = self.current().get(artifact.stage.name)
        found = _read_identity(storage.join(artifact.uri.rpartition("/")[0], named)) if named else None
        if found is None:
            return ""
        changed = differences(found["keys"], artifact.keys)
        return f": {changed or 'its input changed'}"

    def _refuse(self, stage: Stage[Record], root: str, wanted: dict[str, Any]) -> None:
        """Raise LineageError that names what is missing, and what differs from the nearest artefact."""
        complete = [one for one in artifacts_of(root, stage) if one.complete()]
        nearest = min(complete, key=lambda one: len(_changed(one.keys, wanted)), default=None)
        hint = ""
        if nearest is not None:
            changed = differences(nearest.keys, wanted)
            hint = f" The nearest is {nearest.identity}: {changed or 'it was made from another dataset'}."
        raise LineageError(
            f"no {stage.name} of this configuration in {root}: run `recray {stage.verb}` with it first.{hint}"
        )


def identity_of(keys: Mapping[str, Any], inputs: Sequence[str], version: int = 1) -> str:
    """Eight hex digits of SHA-256; `Run.artifact` checks the whole keys, so that a collision cannot pass unnoticed."""
    decides = {"keys": dict(keys), "inputs": list(inputs)} | ({"version": version} if version > 1 else {})
    body = json.dumps(decides, sort_keys=True)
    return hashlib.sha256(body.encode()).hexdigest()[:8]


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"dim": 8}} -> {"model.dim": 8}. Lists are values; an empty table is the value {}."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        key = f"{prefix}{name}"
        flat |= flatten(value, f"{key}.") if isinstance(value, dict) and value else {key: value}
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any], most: int = 4) -> str:
    """'model.dim 64 -> 8, optim.name adamw -> sgd'; empty where nothing differs."""
    changed = _changed(old, new)
    shown = [f"{key} {_short(old.get(key))} -> {_short(new.get(key))}" for key in changed[:most]]
    return ", ".join(shown) + (f" and {len(changed) - most} more" if len(changed) > most else "")


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _below(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def current_of(run_uri: str) -> dict[str, str]:
    """Stage -> identity of the artefacts that a run names as in use; empty where it names none."""
    uri = storage.join(run_uri, _CURRENT)
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
        body = _read_identity(uri)
        if name != "current" and body is not None and body["stage"] == stage.name and body["identity"] == name:
            found.append(Artifact(stage, uri, name, body["keys"], body["inputs"], body["created"]))
    return found


def _read_identity(uri: str) -> dict[str, Any] | None:
    file = storage.join(uri, _IDENTITY)
    if not storage.exists(file):
        return None
    remedy = f"delete the folder {uri}, and run its stage again"
    body = sealed.read(file, remedy)
    if not {"stage", "identity", "keys", "inputs", "created"} <= body.keys():
        raise LineageError(f"{file} is damaged: {remedy}")
    return body
