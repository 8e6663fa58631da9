"""Start training: in this process, or as workers of a Ray TorchTrainer."""

from __future__ import annotations

import gc
import os
import time
import traceback
from typing import TYPE_CHECKING, Any

from recray import log, storage
from recray.cluster import resources, runtime
from recray.cluster.errors import unwrap
from recray.config import Config, ScalingConfig
from recray.data.dataset import PreparedDataset
from recray.records import CheckpointRecord
from recray.training import checkpoint
from recray.training.distributed import Context, LocalContext, RayContext, keep_memory, threads
from recray.training.phase import Phase
from recray.training.state import TrainProgress
from recray.training.trainer import OnEpoch, Trainer

if TYPE_CHECKING:
    from ray.train import UserCallback


def train(
    config: Config,
    on_epoch: OnEpoch | None = None,
    callback: UserCallback | None = None,
    until: int | None = None,
) -> CheckpointRecord:
    """Train the model on config.dataset_uri, and publish the best epoch as <run>/checkpoint.

    An interrupted training resumes after its last complete epoch. One that is complete for this configuration is
    returned without training.

    on_epoch: called with every epoch's entry of the history, if training runs in this process.
    callback: receives the same entries from Ray Train workers, if training runs in those.
    until: stop after so many epochs, if that is before the last one. Nothing is published then, the record is that of
        the epoch, and another call resumes there on the same learning rate schedule.

    Raises ConfigError, LineageError, ResourceError, or RecrayError if training diverges.
    """
    started = time.perf_counter()
    dataset = PreparedDataset.open(config.dataset_uri)
    record = _up_to_date(config, dataset)
    if record is not None:
        return record
    until = until if until is not None and until < config.training.epochs else None
    _resume_or_clear(config, dataset)
    if _in_this_process(config):
        with threads(config.scaling):
            fit(config, LocalContext(config.scaling.use_gpu), on_epoch, until)
    else:
        _run_workers(config, callback, until)
    select = selection(config)
    last = CheckpointRecord.read(select.folder(select.last_epoch()))
    if until is not None and last.epoch >= until:  # else training.patience ended it before
        message = f"stopped after epoch {last.epoch} of {config.training.epochs}, as requested"
        log.info("train", message, event="stopped", values={"epoch": last.epoch})
        return last
    return _publish(config, last.best_epoch, time.perf_counter() - started)


def fit(config: Config, context: Context, on_epoch: OnEpoch | None = None, until: int | None = None) -> None:
    """Train on this worker until the best epoch is known; with training.refit then on train and validation events.

    `until`: select for at most so many epochs, and do not refit.
    """
    keep_memory()
    dataset = PreparedDataset.open(config.dataset_uri)
    progress = _fit_phase(config, dataset, selection(config), context, on_epoch, until)
    if config.training.refit and until is None:
        _fit_phase(config, dataset, refit(config, progress.best_epoch), context)


def selection(config: Config) -> Phase:
    """The phase that trains on the train split and validates."""
    return Phase("train", config.training.epochs, storage.join(config.run_uri, "train"))


def refit(config: Config, epochs: int) -> Phase:
    """The phase that trains on train and validation events together. Another number of epochs is another schedule, so
    that it cannot resume from this one."""
    return Phase("refit", epochs, storage.join(config.run_uri, "refit", f"of-{epochs:04d}"))


def last_epoch(config: Config, phase: Phase, dataset: PreparedDataset) -> int:
    """The last complete epoch on disk, if this configuration can resume from it; else 0."""
    last = phase.last_epoch()
    return last if last and same_training(config, CheckpointRecord.read(phase.folder(last)), dataset) else 0


def _fit_phase(
    config: Config,
    dataset: PreparedDataset,
    phase: Phase,
    context: Context,
    on_epoch: OnEpoch | None = None,
    until: int | None = None,
) -> TrainProgress:
    trainer = Trainer(config, dataset, phase, context)
    last = last_epoch(config, phase, dataset) if config.training.resume else 0
    if last:
        trainer.state.load(phase.folder(last))
    return trainer.fit(on_epoch, until)


# Is a checkpoint on disk of this training? ---------------------------------------------------------------------------


def same_training(config: Config, record: CheckpointRecord, dataset: PreparedDataset) -> bool:
    """Whether a checkpoint was made by this configuration, up to how long it trains, from this dataset."""
    now, then = _steering(config.model_dump(mode="json")), _steering(record.config)
    return record.parents == [dataset.record.id] and now == then


def _steering(config: dict[str, Any]) -> list[Any]:
    training = [config["training"].get(name) for name in ("global_batch_size", "accumulation_steps", "half_life")]
    others = (config[name] for name in ("model", "optim", "data"))
    return [config["run"]["seed"], *training, loss_that_steers(config["loss"]), *others]


def loss_that_steers(loss: dict[str, Any]) -> dict[str, Any]:
    """The keys of a record's [loss] that change the result, and not only the speed."""
    return {key: value for key, value in loss.items() if key != "chunk_size"}


def _up_to_date(config: Config, dataset: PreparedDataset) -> CheckpointRecord | None:
    """The published checkpoint, if it is of this dataset and configuration."""
    target = storage.join(config.run_uri, "checkpoint")
    if not config.training.resume or not storage.exists(storage.join(target, CheckpointRecord.file_name())):
        return None
    record = CheckpointRecord.read(target)
    training = config.model_dump(mode="json")["training"]
    if record.config.get("training") != training or not same_training(config, record, dataset):
        return None
    log.info("train", f"up to date: {target} ({record.id})", event="up_to_date", values={"uri": target})
    return record


def _resume_or_clear(config: Config, dataset: PreparedDataset) -> None:
    """Say from where training resumes; delete epochs that it cannot resume from."""
    last = last_epoch(config, selection(config), dataset) if config.training.resume else 0
    if last:
        log.info("train", f"resuming after epoch {last}", event="resume", values={"epoch": last})
        return
    for phase in ("train", "refit"):
        storage.delete_folder(storage.join(config.run_uri, phase))


def _publish(config: Config, epoch: int, seconds: float) -> CheckpointRecord:
    """Copy the best epoch, or the refitted model, to <run>/checkpoint. Its metric is that of the best epoch of selection."""
    select, refits = selection(config), config.training.refit
    best = CheckpointRecord.read(select.folder(epoch))
    folder = refit(config, epoch).folder(epoch) if refits else select.folder(epoch)
    target = storage.join(config.run_uri, "checkpoint")
    storage.delete_folder(target)
    update = {"seconds": seconds, "value": best.value, "best_epoch": epoch, "history": best.history}
    record = checkpoint.publish(folder, target, CheckpointRecord.read(folder).model_copy(update=update))
    log.info(
        "train",
        f"best {record.metric} {record.value:.4f} (validation) at epoch {epoch}"
        f"{', refitted with the validation events' if refits else ''}; {seconds:.1f} s in total",
        event="published",
        values={"metric": record.metric, "value": record.value, "epoch": epoch, "refit": refits, "seconds": seconds},
    )
    return record


# Workers -------------------------------------------------------------------------------------------------------------


def _in_this_process(config: Config) -> bool:
    """Whether this process trains: by scaling.num_workers = 0, or as the only worker on a machine without a cluster.

    A Ray worker would run the same training seconds later, after Ray and Ray Train's controller have started.
    """
    scaling = config.scaling
    if scaling.num_workers == 1 and not runtime.is_shared():
        return scaling.reader == "worker" or (scaling.reader == "auto" and "://" not in config.dataset_uri)
    return scaling.num_workers == 0


def _run_workers(config: Config, callback: UserCallback | None, until: int | None) -> None:
    runtime.start(config.scaling, tasks=False)
    if not runtime.is_own():
        resources.wait_for_workers(config.scaling)
    from ray import train as ray_train

    scaling = config.scaling
    local = "://" not in config.run_uri
    trainer = _trainer_class()(
        train_loop_per_worker,
        train_loop_config={"config": config.model_dump(mode="json"), "report": callback is not None, "until": until},
        backend_config=_backend(scaling),
        scaling_config=ray_train.ScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=scaling.use_gpu,
            resources_per_worker=resources.of_worker(scaling),
        ),
        run_config=ray_train.RunConfig(
            name="ray",
            callbacks=[callback] if callback is not None else [],
            logging_config=ray_train.LoggingConfig(log_level="WARNING"),
            storage_path=os.path.abspath(storage.join(config.run_uri, "train"))
            if local
            else storage.join(config.run_uri, "train"),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise (unwrap(error) or error) from error


def _backend(scaling: ScalingConfig) -> Any:
    """The process group of the workers. A single worker on a CPU needs none, and Ray Train's controller then no torch."""
    if scaling.num_workers == 1 and not scaling.use_gpu:
        return None
    from ray.train.torch import TorchConfig

    return TorchConfig(backend="nccl" if scaling.use_gpu else "gloo")


def _trainer_class() -> Any:
    if runtime.is_own():
        from recray.cluster.local_trainer import LocalTrainer

        return LocalTrainer
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    return DataParallelTrainer


def train_loop_per_worker(settings: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    import ray.train

    log.configure_worker()
    config = Config.model_validate(settings["config"])
    report = ray.train.report if settings["report"] else None
    try:
        with threads(config.scaling):
            fit(config, RayContext(config.scaling), report, settings["until"])
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # their locals hold the model
        raise
    finally:
        # Ray destroys the process group next. The reducer of DDP holds a reference to it, and so must be gone by then:
        # as the last owner it would run gloo's destructor while holding the GIL, which joins a thread that may wait for
        # the GIL. torch's own destroy_process_group releases the GIL first. The model is in reference cycles.
        gc.collect()
