"""What a sweep stores on disk, and resumes from.

<run>/tune/<identity>/             the artefact: its identity is the keys that make trials comparable (artifacts.TUNE)
    trials/0007/                   an ordinary run folder with a checkpoint, and
        point.json                 the trial's values, written before it starts
        trial.json                 TrialRecord, written whenever it stops: for good, at a rung, or because of the budget
    seeds/0007-2/                  the same for finalist 7 on seed 2
    tune.json                      TuneRecord, written last
    tune.html  best.toml

A trial whose record is finished is never run again. One that is not, or has no record, is resumed from its newest state.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from recray import layout, sealed, storage
from recray.artifacts import CHECKPOINT, TUNE, Artifact, Run, artifacts_of
from recray.config import Config, TuneConfig, with_values
from recray.data.dataset import PreparedDataset
from recray.records import Trial, TrialRecord, TuneRecord
from recray.training.launch import selection
from recray.tuning.space import Point


@dataclass(frozen=True)
class TrialSpec:
    """A training run to be done: as a trial of the search, or as a finalist on another seed."""

    folder: str  # relative to the sweep's: trials/NNNN or seeds/NNNN-SEED
    values: Point
    seed: int
    until: int | None = None  # the epoch at which it pauses at a rung; None: it trains to the end

    @property
    def number(self) -> int:
        return int(self.folder.partition("/")[2][:4])

    @property
    def name(self) -> str:
        """Its name in Ray Tune, which allows no slashes."""
        return self.folder.replace("/", "-", 1)

    @staticmethod
    def of(name: str, settings: dict[str, Any]) -> TrialSpec:
        """From a name in Ray Tune and settings. PBT copies settings between trials, folder included; names stay."""
        return TrialSpec(name.replace("-", "/", 1), settings["values"], settings["seed"], settings["until"])


@dataclass(frozen=True)
class SweepStore:
    config: Config
    dataset: PreparedDataset
    artifact: Artifact[TuneRecord]

    @classmethod
    def of(cls, config: Config) -> SweepStore:
        """The sweep of a configuration whose dataset is prepared. Raises LineageError when it is not."""
        run = Run(config)
        dataset = PreparedDataset.of(run)
        return cls(config, dataset, run.artifact(TUNE, [dataset.record.id]))

    @property
    def uri(self) -> str:
        """The folder of the sweep."""
        return self.artifact.uri

    def open(self) -> None:
        """Mark the folder before anything is in it. A complete sweep stays open: tune.trials, for example, may grow."""
        if not self.artifact.complete():
            Run(self.config).begin(self.artifact)

    def trial_config(self, spec: TrialSpec) -> Config:
        return trial_config(self.config, spec, self.uri, self.dataset.uri)

    def spec(self, number: int, values: Point) -> TrialSpec:
        return TrialSpec(f"trials/{number:04d}", values, self.config.run.seed)

    def write_point(self, spec: TrialSpec) -> None:
        sealed.write(self._file(spec.folder, "point.json"), {"number": spec.number, "values": spec.values})

    def read_point(self, number: int) -> Point | None:
        """The values of a trial that was started before; None when it was not."""
        uri = self._file(f"trials/{number:04d}", "point.json")
        if not storage.exists(uri):
            return None
        values: Point = sealed.read(uri, f"delete {os.path.dirname(uri)}, and search again")["values"]
        return values

    def write_trial(self, spec: TrialSpec, trial: Trial) -> None:
        """Write the record of a trial that has stopped. A finished one will not be resumed: its epochs are deleted."""
        config = self.trial_config(spec)
        body = config.model_dump(mode="json")
        record = TrialRecord(parents=[self.dataset.record.id], config=body, seconds=trial.seconds, trial=trial)
        record.write(storage.join(self.uri, spec.folder))
        if not trial.finished:
            return
        # With PBT a trial has a folder of epochs for every set of values that it trained with.
        for checkpoint in artifacts_of(storage.join(config.run_uri, CHECKPOINT.name), CHECKPOINT):
            if checkpoint.complete():
                layout.clear(selection(config, checkpoint.uri).root, layout.EPOCHS)
            else:
                checkpoint.clear()

    def read_trial(self, folder: str) -> Trial | None:
        if not storage.exists(self._file(folder, TrialRecord.file_name())):
            return None
        return TrialRecord.read(storage.join(self.uri, folder)).trial

    def read_trials(self) -> list[Trial]:
        """The trials of the search that have a record, by number."""
        trials, number = [], 1
        while self.read_point(number) is not None:
            trial = self.read_trial(f"trials/{number:04d}")
            trials += [trial] if trial is not None else []
            number += 1
        return trials

    def _file(self, folder: str, name: str) -> str:
        return storage.join(self.uri, folder, name)


def sweep_uri(config: Config) -> str:
    """The folder of a configuration's sweep. Raises LineageError when its dataset is not prepared."""
    return SweepStore.of(config).uri


def trial_config(base: Config, spec: TrialSpec, sweep: str, dataset: str) -> Config:
    """The configuration of a trial: an ordinary run. sweep, dataset: their folders."""
    parent, _, name = spec.folder.partition("/")
    values: dict[str, Any] = {
        **spec.values,
        "run.output": storage.join(sweep, parent),
        "run.name": name,
        "run.dataset": dataset,
        "run.seed": spec.seed,
        "training.refit": False,  # only for the winner, after the search
        "training.resume": True,
    }
    if base.scaling.num_workers == 1:
        values["scaling.num_workers"] = 0  # a single worker trains in the trial's own process
    return with_values(base.model_copy(update={"tune": TuneConfig()}), values, where=f"trial {spec.number}")
