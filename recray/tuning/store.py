"""What a sweep leaves on disk, which is also what it goes on from.

<run>/tune/sweep.json             what makes trials comparable; another sweep is refused
           trials/0007/           an ordinary run folder (train/, checkpoint/), and
               point.json         the trial's values, written before it starts
               trial.json         TrialRecord, written when it stops training: for good, at a rung, by the budget
           seeds/0007-2/          the same of a finalist on seed 2
           tune.json              TuneRecord, written last
           tune.html  best.toml
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recray import storage
from recray.config import Config, TuneConfig, with_values
from recray.data.dataset import PreparedDataset
from recray.errors import LineageError
from recray.records import Trial, TrialRecord
from recray.training.launch import loss_that_steers
from recray.tuning.space import Point

# What may change when a sweep goes on: how much is tried, how much of it at a time, and what is done with the best.
_FREE = ("trials", "seconds", "epochs", "concurrent", "cpus_per_trial", "gpus_per_trial", "top", "seeds")


@dataclass(frozen=True)
class Job:
    """A train to be done."""

    folder: str  # below the sweep's: trials/NNNN or seeds/NNNN-SEED
    values: Point
    seed: int
    until: int | None = None  # epochs after which it waits at a rung; None: to its end

    @property
    def number(self) -> int:
        return int(self.folder.partition("/")[2][:4])

    @property
    def name(self) -> str:
        """In Tune, which wants no slashes; a name stays a trial's own when PBT gives it another's settings."""
        return self.folder.replace("/", "-", 1)

    @staticmethod
    def of(name: str, settings: dict[str, Any]) -> Job:
        return Job(name.replace("-", "/", 1), settings["values"], settings["seed"], settings["until"])


@dataclass(frozen=True)
class SweepStore:
    config: Config
    dataset: PreparedDataset

    @property
    def uri(self) -> str:
        return storage.join(self.config.run_uri, "tune")

    def open(self) -> None:
        """Raises LineageError where another sweep lies in the folder."""
        body = self.config.model_dump(mode="json")
        kept = {key: value for key, value in body["tune"].items() if key not in _FREE}
        kept |= {key: body[key] for key in ("model", "optim", "training")}
        kept |= {"loss": loss_that_steers(body["loss"]), "seed": body["run"]["seed"], "dataset": self.dataset.record.id}
        uri = storage.join(self.uri, "sweep.json")
        if storage.exists(uri):
            there = storage.read_json(uri)
            there["loss"] = loss_that_steers(there["loss"])
            changed = [key for key, value in there.items() if kept.get(key) != value]
            if changed:
                raise LineageError(
                    f"{self.uri} holds a sweep of another configuration ({', '.join(changed)} differ): set another run.name, or "
                    f"delete that folder; {', '.join(f'tune.{key}' for key in _FREE)} may change when a sweep goes on"
                )
            return
        storage.write_json(uri, kept)

    def job(self, number: int, values: Point) -> Job:
        return Job(f"trials/{number:04d}", values, self.config.run.seed)

    def begin(self, job: Job) -> None:
        storage.write_json(
            storage.join(self.uri, job.folder, "point.json"), {"number": job.number, "values": job.values}
        )

    def begun(self, number: int) -> Point | None:
        """The values of a trial that was begun before."""
        uri = storage.join(self.uri, f"trials/{number:04d}", "point.json")
        if not storage.exists(uri):
            return None
        values: Point = storage.read_json(uri)["values"]
        return values

    def read(self, folder: str) -> Trial | None:
        """The trial whose record lies there."""
        uri = storage.join(self.uri, folder)
        if not storage.exists(storage.join(uri, TrialRecord.file_name())):
            return None
        return TrialRecord.read(uri).trial

    def past(self) -> list[Trial]:
        """Trials of the search that have a record, by number: those that ended, that wait, and that a budget cut."""
        trials, number = [], 1
        while self.begun(number) is not None:
            trial = self.read(f"trials/{number:04d}")
            trials += [trial] if trial is not None else []
            number += 1
        return trials

    def end(self, job: Job, trial: Trial) -> None:
        """Write the record, then drop what only going on would need; what waits or was cut may go on."""
        body = trial_config(self.config, job).model_dump(mode="json")
        folder = storage.join(self.uri, job.folder)
        TrialRecord(parents=[self.dataset.record.id], config=body, seconds=trial.seconds, trial=trial).write(folder)
        if trial.over:
            storage.delete_folder(storage.join(folder, "train"))


def trial_config(base: Config, job: Job) -> Config:
    """An ordinary train on the sweep's dataset. One worker trains in the trial's own process."""
    values: dict[str, Any] = {
        **job.values,
        "run.output": storage.join(base.run_uri, "tune", job.folder.partition("/")[0]),
        "run.name": job.folder.partition("/")[2],
        "run.dataset": base.dataset_uri,
        "run.seed": job.seed,
        "training.refit": False,  # after the search, for the winner alone
        "training.resume": True,
    }
    if base.scaling.num_workers == 1:
        values["scaling.num_workers"] = 0
    return with_values(base.model_copy(update={"tune": TuneConfig()}), values, where=f"trial {job.number}")
