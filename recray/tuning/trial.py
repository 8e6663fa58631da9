"""One trial, in the process that Ray Tune gave it: an ordinary training run that reports every epoch."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import logging
import os
import stat
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from ray import tune

from recray import layout, sealed, storage
from recray.artifacts import CHECKPOINT, Run
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.errors import StorageError
from recray.records import CheckpointRecord, DatasetRecord
from recray.training.launch import selection, train
from recray.tuning.objective import Objective
from recray.tuning.store import TrialSpec, trial_config


@dataclass(frozen=True)
class Sweep:
    """What all trials have in common."""

    config: dict[str, Any]  # of the sweep, without defaults
    uri: str
    dataset_uri: str
    cpus: int


def run_trial(settings: dict[str, Any], sweep: Sweep) -> None:
    """Train the TrialSpec in `settings`.

    Reports the history entry of every epoch; the last report has "ended" ("done", or "paused" at a rung) or "failed".
    A failure is reported and not raised, because the process is reused for the next trial.
    """
    torch.set_num_threads(sweep.cpus)
    logging.getLogger("recray").setLevel(logging.ERROR)  # progress is shown where the sweep was started
    # Before it resets this process for another trial, Ray waits this long for the last one's threads.
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "60")
    config = Config.model_validate(sweep.config)
    last: dict[str, Any] = {"epoch": 0.0, Objective.of(config).metric: float("nan")}
    try:
        spec = TrialSpec.of(tune.get_context().get_trial_name(), settings)
        population = config.tune.search == "pbt"
        config = trial_config(config, spec, sweep.uri, sweep.dataset_uri)
        # Several workers read from any node, so they read the dataset itself.
        open_dataset = PreparedDataset.open if config.scaling.num_workers else on_this_node
        dataset = open_dataset(sweep.dataset_uri)
        reporter = _Reporter(config, dataset, spec.until, last, population)
        reporter.report_earlier_epochs()
        train(config, reporter.on_epoch, _worker_callback(config), spec.until, dataset)
        reporter.report_end()
    except Exception as error:
        lines = f"{type(error).__name__}: {error}".strip().splitlines()
        error.__traceback__ = None  # its frames hold the model, and the next trial needs the memory
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tune.report({**last, "failed": lines[0]})


def on_this_node(uri: str) -> PreparedDataset:
    """A prepared dataset; of one in an object store a local copy, made once per node, without the test split."""
    dataset = PreparedDataset.open(uri)
    if "://" not in uri:
        return dataset
    local = os.path.join(_own_folder(), dataset.record.id)
    with open(f"{local}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # trials start at the same time
        if not storage.exists(storage.join(local, DatasetRecord.file_name())):
            shards = dataset.record.shards
            for file in ("items.parquet", *(shard.file for split in ("train", "valid") for shard in shards[split])):
                storage.copy_file(dataset.file_uri(file), storage.join(local, file))
            sealed.write(storage.join(local, DatasetRecord.file_name()), dataset.record.model_dump(mode="json"))
    return PreparedDataset.open(local)


def _own_folder() -> str:
    """This user's folder for temporary files that last. Raises StorageError if another user could have put files in it."""
    path = os.path.join(tempfile.gettempdir(), f"recray-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise StorageError(
            f"{path} is not a folder that only user {os.getuid()} can read and write: delete it, or set TMPDIR to a folder "
            f"of your own"
        )
    return path


class _Reporter:
    """Reports epochs to Ray Tune.

    The last epoch is reported together with the end of the trial: reported before, a rule could still stop the trial
    that is complete. `last` is updated in place, so that a failure is reported with the last epoch.
    """

    def __init__(
        self, config: Config, dataset: PreparedDataset, until: int | None, last: dict[str, Any], population: bool
    ) -> None:
        self._config, self._last, self._population = config, last, population
        self._until = min(until or config.training.epochs, config.training.epochs)
        self._artifact = Run(config).artifact(CHECKPOINT, [dataset.record.id])
        self._phase = selection(config, self._artifact.uri)

    def report_earlier_epochs(self) -> None:
        """What a resumed trial has on disk, marked "again"; with PBT, first copy the weights that Ray Tune chose."""
        checkpoint = tune.get_checkpoint() if self._population else None
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                self._copy_member(folder)
            return
        done = self._phase.last_epoch()
        if done:
            record = CheckpointRecord.read(self._phase.folder(done))
        elif self._artifact.complete():
            record = CheckpointRecord.read(self._artifact.uri)
        else:
            return
        for entry in record.history:
            self._report(entry, again=True)

    def on_epoch(self, entry: dict[str, float]) -> None:
        self._last.update(entry)
        if int(entry["epoch"]) < self._until:
            self._report(entry)

    def report_end(self) -> None:
        done = self._artifact.complete()
        record = CheckpointRecord.read(self._artifact.uri if done else self._phase.folder(self._until))
        # With several workers the epochs were reported by them, not by on_epoch, and the record has the last known one.
        entry = self._last if self._last["epoch"] else record.history[-1]
        tune.report({**entry, "ended": "done" if done else "paused"})

    def _report(self, entry: dict[str, float], again: bool = False) -> None:
        self._last.update(entry)
        if not self._population:
            tune.report({**entry, "again": again})
            return
        # Any member may be copied by another one: its last epoch to resume from, its best one to publish in the end.
        with tempfile.TemporaryDirectory() as folder:
            last = int(entry["epoch"])
            best = CheckpointRecord.read(self._phase.folder(last)).best_epoch
            for epoch in {last, best} - {0}:
                storage.copy_folder(self._phase.folder(epoch), os.path.join(folder, f"epoch-{epoch:04d}"))
            tune.report({**entry, "again": again}, checkpoint=tune.Checkpoint.from_directory(folder))

    def _copy_member(self, folder: str) -> None:
        """Continue from the epochs in `folder`, this trial's own or another member's, under this configuration."""
        Run(self._config).begin(self._artifact)
        layout.clear(self._phase.root, layout.EPOCHS)
        for name in os.listdir(folder):
            target = storage.join(self._phase.root, name)
            storage.copy_folder(os.path.join(folder, name), target)
            record = CheckpointRecord.read(target)
            record.model_copy(update={"config": self._config.model_dump(mode="json")}).write(target)


def _worker_callback(config: Config) -> Any:
    """Passes the reports of a trainer's workers on to Ray Tune; None when training runs in this process."""
    if config.scaling.num_workers == 0:
        return None
    from ray.tune.integration.ray_train import TuneReportCallback

    return TuneReportCallback()
