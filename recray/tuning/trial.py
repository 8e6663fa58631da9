"""One trial, in the process that Ray Tune gave it: an ordinary training run that reports every epoch."""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import tempfile
from typing import Any

import torch
from ray import tune

from recray import storage
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.records import CheckpointRecord, DatasetRecord
from recray.training.checkpoint import load_state
from recray.training.launch import train
from recray.training.state import Phase, last_epoch
from recray.tuning.objective import Objective
from recray.tuning.store import TrialSpec, trial_config


def run_trial(settings: dict[str, Any], base: dict[str, Any], sweep_uri: str, cpus: int) -> None:
    """Train the TrialSpec in `settings` with `base`, the configuration of the sweep.

    Reports the history entry of every epoch; the last report has "ended" ("done", or "paused" at a rung) or "failed".
    A failure is reported and not raised, because the process is reused for the next trial.
    """
    torch.set_num_threads(cpus)
    logging.getLogger("recray").setLevel(logging.ERROR)  # progress is shown where the sweep was started
    # Before it resets this process for another trial, Ray waits this long for the last one's threads.
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "60")
    config = Config.model_validate(base)
    last: dict[str, Any] = {"epoch": 0.0, Objective.of(config).metric: float("nan")}
    try:
        spec = TrialSpec.of(tune.get_context().get_trial_name(), settings)
        population = config.tune.search == "pbt"
        config = on_this_node(trial_config(config, spec, sweep_uri))
        reporter = _Reporter(config, spec.until, last, population)
        reporter.report_earlier_epochs()
        train(config, on_epoch=reporter.on_epoch, callback=_worker_callback(config), until=spec.until)
        reporter.report_end()
    except Exception as error:
        lines = f"{type(error).__name__}: {error}".strip().splitlines()
        error.__traceback__ = None  # its frames hold the model, and the next trial needs the memory
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tune.report({**last, "failed": lines[0]})


def on_this_node(config: Config) -> Config:
    """Read a dataset in an object store from a local copy, made once for all trials of a node, without the test split."""
    if "://" not in config.dataset_uri or config.scaling.num_workers:
        return config
    dataset = PreparedDataset.open(config.dataset_uri)
    local = os.path.join(tempfile.gettempdir(), f"recray-{dataset.record.id}")
    with open(f"{local}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # trials start at the same time
        if not storage.exists(storage.join(local, DatasetRecord.file_name())):
            shards = dataset.record.shards
            for file in ("items.parquet", *(shard.file for split in ("train", "valid") for shard in shards[split])):
                storage.copy_file(dataset.file_uri(file), storage.join(local, file))
            storage.write_json(storage.join(local, DatasetRecord.file_name()), dataset.record.model_dump(mode="json"))
    return config.model_copy(update={"run": config.run.model_copy(update={"dataset": local})})


class _Reporter:
    """Reports epochs to Ray Tune.

    The last epoch is reported together with the end of the trial: reported before, a rule could still stop the trial
    that is complete. `last` is updated in place, so that a failure is reported with the last epoch.
    """

    def __init__(self, config: Config, until: int | None, last: dict[str, Any], population: bool) -> None:
        self._config, self._last, self._population = config, last, population
        self._until = min(until or config.training.epochs, config.training.epochs)
        self._dataset = PreparedDataset.open(config.dataset_uri)
        self._phase = Phase("train", config.training.epochs)
        self._published = storage.join(config.run_uri, "checkpoint")

    def report_earlier_epochs(self) -> None:
        """What a resumed trial has on disk, marked "again"; with PBT, first copy the weights that Ray Tune chose."""
        checkpoint = tune.get_checkpoint() if self._population else None
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                self._copy_member(folder)
            return
        done = last_epoch(self._config, self._phase, self._dataset)
        if done:
            record = CheckpointRecord.read(self._folder(done))
        elif self._is_published():
            record = CheckpointRecord.read(self._published)
        else:
            return
        for entry in record.history:
            self._report(entry, again=True)

    def on_epoch(self, entry: dict[str, float]) -> None:
        self._last.update(entry)
        if int(entry["epoch"]) < self._until:
            self._report(entry)

    def report_end(self) -> None:
        done = self._is_published()
        record = CheckpointRecord.read(self._published if done else self._folder(self._until))
        # With several workers the epochs were reported by them, not by on_epoch, and the record has the last known one.
        entry = self._last if self._last["epoch"] else record.history[-1]
        tune.report({**entry, "ended": "done" if done else "paused"})

    def _is_published(self) -> bool:
        return storage.exists(storage.join(self._published, CheckpointRecord.file_name()))

    def _folder(self, epoch: int) -> str:
        return self._phase.folder(self._config, epoch)

    def _report(self, entry: dict[str, float], again: bool = False) -> None:
        self._last.update(entry)
        if not self._population:
            tune.report({**entry, "again": again})
            return
        # Any member may be copied by another one: its last epoch to resume from, its best one to publish in the end.
        with tempfile.TemporaryDirectory() as folder:
            last = int(entry["epoch"])
            best = int(load_state(self._folder(last))["best_epoch"])
            for epoch in {last, best} - {0}:
                storage.download_folder(self._folder(epoch), os.path.join(folder, f"epoch-{epoch:04d}"))
            tune.report({**entry, "again": again}, checkpoint=tune.Checkpoint.from_directory(folder))

    def _copy_member(self, folder: str) -> None:
        """Replace this trial's epochs by those in `folder`, under this trial's own configuration."""
        names = sorted(os.listdir(folder))
        if last_epoch(self._config, self._phase, self._dataset) == int(names[-1].removeprefix("epoch-")):
            return  # its own epochs: Ray Tune only paused it
        root = self._phase.root(self._config)
        storage.delete_folder(root)
        for name in names:
            target = storage.join(root, name)
            storage.upload_folder(os.path.join(folder, name), target)
            record = CheckpointRecord.read(target)
            record.model_copy(update={"config": self._config.model_dump(mode="json")}).write(target)


def _worker_callback(config: Config) -> Any:
    """Passes the reports of a trainer's workers on to Ray Tune; None when training runs in this process."""
    if config.scaling.num_workers == 0:
        return None
    from ray.tune.integration.ray_train import TuneReportCallback

    return TuneReportCallback()
