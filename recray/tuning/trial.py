"""One trial, in the process that Tune gave it: an ordinary train that reports every epoch."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import tempfile
from typing import Any

import torch

from recray import storage
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.records import CheckpointRecord, DatasetRecord
from recray.training.launch import last_epoch, selection, train
from recray.tuning.store import Job, trial_config


def run_trial(settings: dict[str, Any], base: dict[str, Any], cpus: int) -> None:
    """Train the Job in `settings`. Reports every epoch's entry of the history, the last with "ended" ("done", or "paused"
    at a rung) or "failed".

    A failure is reported, not raised: the process lives on for the next trial.
    """
    from ray import tune

    torch.set_num_threads(cpus)
    # Ray reads it when this process is to get another trial: the threads of the one before may take that long to end.
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "60")
    started = Config.model_validate(base)
    last: dict[str, Any] = {"epoch": 0.0, started.training.metric: float("nan")}
    try:
        job = Job.of(tune.get_context().get_trial_name(), settings)
        config = on_this_node(trial_config(started, job))
        reporter = _Reporter(config, last, job.until, started.tune.search == "pbt")
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            reporter.go_on()
            train(config, on_epoch=reporter.epoch, callback=_callback(config), until=job.until)
        reporter.end()
    except Exception as error:
        lines = f"{type(error).__name__}: {error}".strip().splitlines()
        error.__traceback__ = None  # its frames hold the model, and the next trial needs the memory
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tune.report({**last, "failed": lines[0]})


def on_this_node(config: Config) -> Config:
    """A dataset on an object store is fetched once for all trials of a node, without its test split."""
    if "://" not in config.dataset_uri or config.scaling.num_workers:
        return config
    dataset = PreparedDataset.open(config.dataset_uri)
    here = os.path.join(tempfile.gettempdir(), f"recray-{dataset.record.id}")
    with open(f"{here}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not storage.exists(storage.join(here, DatasetRecord.file_name())):
            shards = dataset.record.shards
            for file in ("items.parquet", *(shard.file for split in ("train", "valid") for shard in shards[split])):
                storage.write_bytes(storage.join(here, file), storage.read_bytes(dataset.file_uri(file)))
            storage.write_json(storage.join(here, DatasetRecord.file_name()), dataset.record.model_dump(mode="json"))
    return config.model_copy(update={"run": config.run.model_copy(update={"dataset": here})})


class _Reporter:
    """Passes epochs to Tune. The last one goes with the news that the trial ended, so that nobody stops it before."""

    def __init__(self, config: Config, last: dict[str, Any], until: int | None, population: bool) -> None:
        self._config, self._last, self._population = config, last, population
        self._until = min(until or config.training.epochs, config.training.epochs)
        self._dataset = PreparedDataset.open(config.dataset_uri)
        self._select = selection(config)

    def go_on(self) -> None:
        """Take over another's weights where Tune says so; else report what an interrupted trial has on disk already."""
        from ray import tune

        checkpoint = tune.get_checkpoint() if self._population else None
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                self._take_over(folder)
            return
        done = last_epoch(self._config, self._select, self._dataset)
        published = storage.join(self._config.run_uri, "checkpoint")
        if done:
            self._again(CheckpointRecord.read(self._select.folder(done)))
        elif storage.exists(storage.join(published, CheckpointRecord.file_name())):
            self._again(CheckpointRecord.read(published))

    def _again(self, record: CheckpointRecord) -> None:
        for entry in record.history:
            self._report(entry, again=True)

    def epoch(self, entry: dict[str, float]) -> None:
        self._last.update(entry)
        if int(entry["epoch"]) < self._until:
            self._report(entry)

    def _report(self, entry: dict[str, float], again: bool = False) -> None:
        from ray import tune

        self._last.update(entry)
        if not self._population:
            tune.report({**entry, "again": again})
            return
        with tempfile.TemporaryDirectory() as folder:
            last = int(entry["epoch"])
            best = CheckpointRecord.read(self._select.folder(last)).best_epoch
            for number in {last, best} - {0}:
                name = f"epoch-{number:04d}"
                storage.download_folder(self._select.folder(number), os.path.join(folder, name))
            tune.report({**entry, "again": again}, checkpoint=tune.Checkpoint.from_directory(folder))

    def end(self) -> None:
        from ray import tune

        folder, ended = storage.join(self._config.run_uri, "checkpoint"), "done"
        if not storage.exists(storage.join(folder, CheckpointRecord.file_name())):
            folder, ended = self._select.folder(self._until), "paused"
        # A checkpoint's own history ends at its best epoch; workers of a trainer reported the others themselves.
        history = CheckpointRecord.read(folder).history
        tune.report({**(self._last if self._last["epoch"] else history[-1]), "ended": ended})

    def _take_over(self, folder: str) -> None:
        """Epochs of the member that Tune chose become this trial's own, under this trial's configuration."""
        names = sorted(os.listdir(folder))
        epoch = int(names[-1].removeprefix("epoch-"))
        if last_epoch(self._config, self._select, self._dataset) == epoch:
            return  # it was only paused
        storage.delete_folder(self._select.root)
        for name in names:
            target = storage.join(self._select.root, name)
            storage.upload_folder(os.path.join(folder, name), target)
            record = CheckpointRecord.read(target)
            record.model_copy(update={"config": self._config.model_dump(mode="json")}).write(target)


def _callback(config: Config) -> Any:
    """What carries the epochs of a trainer's workers here; none where training is in this process."""
    if config.scaling.num_workers == 0:
        return None
    from ray.tune.integration.ray_train import TuneReportCallback

    return TuneReportCallback()
