"""What a sweep stores on disk, and resumes from.

<sweep>/sweep.json             the keys that make its trials comparable, with their values
        trials/0007/           an ordinary run folder (train/, checkpoint/), and
            point.json         the trial's values, written before it starts
            trial.json         TrialRecord, written whenever it stops: for good, at a rung, or because of the budget
        seeds/0007-2/          the same for finalist 7 on seed 2
        tune.json              TuneRecord, written last
        tune.html  best.toml

A trial with a record that is finished is never run again. One without (or "interrupted") is resumed from its last epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recray import storage
from recray.config import Config, TuneConfig, with_values
from recray.data.dataset import PreparedDataset
from recray.errors import LineageError
from recray.records import Trial, TrialRecord
from recray.tuning.space import Point

# Trials are comparable when these keys (dotted prefixes) have the same values; another value is another sweep ...
COMPARABLE = (
    *("model", "loss", "optim", "training", "tune"),
    *("run.seed", "evaluation.filter_seen", "evaluation.queries"),  # the latter two define the validation metric
)
# ... except for these: how much is tried, how much of it at a time, what is done with the best, and mere speed.
FREE = (
    *("tune.trials", "tune.seconds", "tune.epochs", "tune.concurrent", "tune.top", "tune.seeds"),
    *("tune.cpus_per_trial", "tune.gpus_per_trial", "loss.chunk_size"),
)


def comparable_values(config: Config, dataset_id: str) -> dict[str, Any]:
    """Dotted key -> value of everything that makes trials comparable, and the dataset's id."""
    values = _flatten(config.model_dump(mode="json"))
    kept = {key: value for key, value in values.items() if _below(key, COMPARABLE) and not _below(key, FREE)}
    return {**kept, "dataset": dataset_id}


def sweep_uri(config: Config) -> str:
    """The folder of a configuration's sweep."""
    return storage.join(config.run_uri, "tune")


def _below(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


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

    @property
    def uri(self) -> str:
        return sweep_uri(self.config)

    def open(self) -> None:
        """Start or resume the sweep. Raises LineageError when the folder holds a sweep that is not comparable."""
        values = comparable_values(self.config, self.dataset.record.id)
        uri = storage.join(self.uri, "sweep.json")
        if not storage.exists(uri):
            storage.write_json(uri, values)
            return
        stored = storage.read_json(uri)
        changed = sorted(key for key in stored | values if key not in stored or stored[key] != values.get(key))
        if changed:
            raise LineageError(
                f"{self.uri} holds a sweep of another configuration, whose trials could not be compared with new ones "
                f"({', '.join(changed)} differ): set another run.name, or delete that folder. "
                f"Only {', '.join(FREE)} may change when a sweep is resumed"
            )

    def spec(self, number: int, values: Point) -> TrialSpec:
        return TrialSpec(f"trials/{number:04d}", values, self.config.run.seed)

    def write_point(self, spec: TrialSpec) -> None:
        storage.write_json(self._file(spec.folder, "point.json"), {"number": spec.number, "values": spec.values})

    def read_point(self, number: int) -> Point | None:
        """The values of a trial that was started before; None when it was not."""
        uri = self._file(f"trials/{number:04d}", "point.json")
        if not storage.exists(uri):
            return None
        values: Point = storage.read_json(uri)["values"]
        return values

    def write_trial(self, spec: TrialSpec, trial: Trial) -> None:
        """Write the record of a trial that has stopped. A finished one will not be resumed: its epochs are deleted."""
        config = trial_config(self.config, spec, self.uri).model_dump(mode="json")
        folder = storage.join(self.uri, spec.folder)
        TrialRecord(parents=[self.dataset.record.id], config=config, seconds=trial.seconds, trial=trial).write(folder)
        if trial.finished:
            storage.delete_folder(storage.join(folder, "train"))

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


def trial_config(base: Config, spec: TrialSpec, folder: str) -> Config:
    """The configuration of a trial: an ordinary training run on the sweep's dataset. folder: that of the sweep."""
    parent, _, name = spec.folder.partition("/")
    values: dict[str, Any] = {
        **spec.values,
        "run.output": storage.join(folder, parent),
        "run.name": name,
        "run.dataset": base.dataset_uri,
        "run.seed": spec.seed,
        "training.refit": False,  # only for the winner, after the search
        "training.resume": True,
    }
    if base.scaling.num_workers == 1:
        values["scaling.num_workers"] = 0  # a single worker trains in the trial's own process
    return with_values(base.model_copy(update={"tune": TuneConfig()}), values, where=f"trial {spec.number}")
