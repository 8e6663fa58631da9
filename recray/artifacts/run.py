"""The run of a configuration: what a stage makes and publishes, and what later stages look for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from recray import layout, locks, log, sealed, storage
from recray.artifacts.artifact import CURRENT, Artifact, artifacts_of, current_of, in_use, read_mark
from recray.artifacts.stage import CHECKPOINT, DATASET, INDEX, Stage, changed, differences, identity_of, is_below
from recray.config import Config
from recray.errors import LineageError
from recray.records import CheckpointRecord, DatasetRecord, IndexRecord, Record
from recray.served import served_of

R = TypeVar("R", bound=Record, covariant=True)


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
        found = read_mark(made.uri)
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
        if read_mark(artifact.uri) is None:
            layout.refuse_foreign(artifact.uri, layout.NOTHING)
        elif anew:
            artifact.clear()
        stage = artifact.stage
        values = {"identity": artifact.identity, "uri": artifact.uri}
        if artifact.complete():
            log.info(stage.verb, f"up to date ({artifact.identity})", event="up_to_date", values=values)
            self.publish(artifact)
            return False
        if read_mark(artifact.uri) is None:
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
        file, link = storage.join(self.uri, CURRENT), storage.join(self.uri, stage, "current")
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
            if one.inputs[0] != dataset_id and not any(is_below(key, ("model",)) for key in changed(one.keys, keys))
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
        found = read_mark(storage.join(artifact.uri.rpartition("/")[0], named)) if named else None
        if found is None:
            return ""
        what = differences(found["keys"], artifact.keys)
        return f": {what or 'its input changed'}"

    def _refuse(self, stage: Stage[Record], root: str, wanted: dict[str, Any]) -> None:
        """Raise LineageError that names what is missing, and what differs from the nearest artefact."""
        complete = [one for one in artifacts_of(root, stage) if one.complete()]
        nearest = min(complete, key=lambda one: len(changed(one.keys, wanted)), default=None)
        hint = ""
        if nearest is not None:
            what = differences(nearest.keys, wanted)
            hint = f" The nearest is {nearest.identity}: {what or 'it was made from another dataset'}."
        raise LineageError(
            f"no {stage.name} of this configuration in {root}: run `recray {stage.verb}` with it first.{hint}"
        )
