"""Start training: in this process, or as workers of a Ray TorchTrainer."""

from __future__ import annotations

import os
import time
from typing import Any

from recray import storage
from recray.cluster import resources, runtime
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.errors import RecrayError
from recray.records import CheckpointRecord
from recray.training import sharded_tables, trainer
from recray.training.distributed import LocalContext, RayContext, threads
from recray.training.state import Phase, best_epoch, last_epoch, same_training


def train(
    config: Config, on_epoch: trainer.OnEpoch | None = None, callback: Any = None, until: int | None = None
) -> CheckpointRecord:
    """Train the model on config.dataset_uri; the best epoch becomes <run>/checkpoint.

    A run that was ended goes on from its last complete epoch; one that is complete
    for this configuration is returned as it is. Who watches gets every epoch's entry
    of the history: `on_epoch` where training is in this process, else `callback`
    (a ray.train.UserCallback), to which the workers report.

    `until`: stop after so many epochs where that is before the end. Nothing is published, the record is that epoch's,
    and another call goes on from there on the same schedule.
    """
    started = time.perf_counter()
    dataset = PreparedDataset.open(config.dataset_uri)
    target = storage.join(config.run_uri, "checkpoint")
    if config.training.resume and storage.exists(storage.join(target, "checkpoint.json")):
        record = CheckpointRecord.read(target)
        same = record.config.get("training") == config.model_dump(mode="json")["training"]
        if same and same_training(config, record, dataset):
            print(f"train: {target} is there for this dataset and configuration ({record.id}); reused", flush=True)
            return record
    select = Phase("train", config.training.epochs)
    until = until if until is not None and until < config.training.epochs else None
    last = last_epoch(config, select, dataset) if config.training.resume else 0
    if last:
        print(f"train: going on after epoch {last}", flush=True)
    else:
        for phase in ("train", "refit"):
            storage.delete_folder(storage.join(config.run_uri, phase))
    if _in_this_process(config):
        with threads(config.scaling):
            trainer.fit(config, LocalContext(config.scaling.use_gpu), on_epoch=on_epoch, until=until)
    else:
        _run_workers(config, [callback] if callback is not None else [], until)
    reached = last_epoch(config, select, dataset)
    if until is not None and reached >= until:  # else its patience ended before
        print(f"train: stopped after epoch {reached} of {config.training.epochs}", flush=True)
        return CheckpointRecord.read(select.folder(config, reached))
    chosen = best_epoch(config, dataset)
    best = CheckpointRecord.read(select.folder(config, chosen))
    published = Phase("refit", chosen) if config.training.refit else select
    record = _publish(published.folder(config, chosen), target, best, time.perf_counter() - started)
    print(
        f"train: best {record.metric} {record.value:.4f} (validation) at epoch {chosen}"
        f"{', refitted with the validation events' if config.training.refit else ''}; {record.seconds:.1f} s in all",
        flush=True,
    )
    return record


def _publish(folder: str, target: str, best: CheckpointRecord, seconds: float) -> CheckpointRecord:
    """Copy weights to <run>/checkpoint, the record last; its metric is that of the best epoch of selection."""
    storage.delete_folder(target)
    made = CheckpointRecord.read(folder)
    tables = [sharded_tables.file_name("tables", piece, made.pieces) for piece in range(made.pieces)]
    for name in ("model.safetensors", "items.safetensors", "dataset.json", *tables):
        storage.copy_file(storage.join(folder, name), storage.join(target, name))
    update = {"seconds": seconds, "value": best.value, "history": best.history}
    return made.model_copy(update=update).write(target)


def _in_this_process(config: Config) -> bool:
    """Whether this process is the worker: as configured, or as the only one on the only machine.

    A Ray worker there is the same training in another process, some seconds after Ray and a controller have started.
    """
    scaling = config.scaling
    if scaling.num_workers == 1 and not runtime.is_shared():
        return scaling.reader == "worker" or (scaling.reader == "auto" and "://" not in config.dataset_uri)
    return scaling.num_workers == 0


def _run_workers(config: Config, callbacks: list[Any], until: int | None) -> None:
    runtime.start(config.scaling, tasks=False)
    if not runtime.is_own():
        resources.wait_for_workers(config.scaling)
    from ray import train as ray_train
    from ray.train.torch import TorchConfig, TorchTrainer

    scaling = config.scaling
    local = "://" not in config.run_uri
    # Ray before 2.56 has no such option and logs the state of every run.
    quiet = (
        {"logging_config": ray_train.LoggingConfig(log_level="WARNING")} if hasattr(ray_train, "LoggingConfig") else {}
    )
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"config": config.model_dump(mode="json"), "report": bool(callbacks), "until": until},
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
        scaling_config=ray_train.ScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=scaling.use_gpu,
            resources_per_worker=resources.of_worker(scaling),
        ),
        run_config=ray_train.RunConfig(
            name="ray",
            callbacks=callbacks,
            **quiet,
            storage_path=os.path.abspath(storage.join(config.run_uri, "train"))
            if local
            else storage.join(config.run_uri, "train"),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise _root(error) from error


def train_loop_per_worker(settings: dict[str, Any]) -> None:
    config = Config.model_validate(settings["config"])
    import ray.train

    with threads(config.scaling):
        report = ray.train.report if settings["report"] else None
        trainer.fit(config, RayContext(config.scaling), on_epoch=report, until=settings["until"])


def _root(error: Exception) -> Exception:
    """The error that recray raised in a worker, out of Ray's wrappers; Ray's own where there is none."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        cause = getattr(failure, "cause", None) or failure
        if isinstance(cause, RecrayError):
            return type(cause)(str(cause))
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, RecrayError):
            return type(seen)(str(seen))
        seen = seen.__cause__
    return error
