"""Start training: in this process, or as workers of a Ray TorchTrainer."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from recray import locks, log, progress, storage, tracking
from recray.artifacts import CHECKPOINT, Artifact, Run, artifacts_of
from recray.cluster import runtime
from recray.config import Config, with_values
from recray.data.dataset import PreparedDataset
from recray.errors import LineageError, StorageError
from recray.records import CheckpointRecord
from recray.training import checkpoint, interrupt, ray_workers, warm_start
from recray.training.check import check_validation
from recray.training.distributed import Context, LocalContext, RayContext, keep_memory, releasing_ddp, threads
from recray.training.phase import Phase, Position
from recray.training.state import TrainProgress, TrainState
from recray.training.trainer import OnEpoch, Trainer
from recray.training.warm_start import WarmStart

if TYPE_CHECKING:
    from ray.train import UserCallback


def train(
    config: Config,
    on_epoch: OnEpoch | None = None,
    callback: UserCallback | None = None,
    until: int | None = None,
    dataset: PreparedDataset | None = None,
) -> CheckpointRecord:
    """Train the model on the run's prepared dataset, and publish the best epoch as the run's checkpoint.

    An interrupted training resumes from its newest saved state (training.save_every). One that is complete for this
    configuration is returned without training.

    on_epoch: called with every epoch's entry of the history, if training runs in this process.
    callback: receives the same entries from Ray Train workers, if training runs in those.
    until: stop after so many epochs, if that is before the last one. Nothing is published then, the record is that of
        the epoch, and another call resumes there on the same learning rate schedule.
    dataset: train on this one. Trials of a sweep share a dataset also when their run.seed differs.

    Raises ConfigError, LineageError, ResourceError, or RecrayError if training diverges.
    """
    run = Run(config)
    dataset = dataset or PreparedDataset.of(run)
    artifact = run.artifact(CHECKPOINT, run.checkpoint_inputs(dataset.record.id))
    with run.making(artifact, anew=not config.training.resume) as needed:
        return _train(run, dataset, artifact, on_epoch, callback, until) if needed else artifact.record


def _train(
    run: Run,
    dataset: PreparedDataset,
    artifact: Artifact[CheckpointRecord],
    on_epoch: OnEpoch | None,
    callback: UserCallback | None,
    until: int | None,
) -> CheckpointRecord:
    started, config = time.perf_counter(), run.config
    check_validation(config, dataset)
    start = _start(run, artifact, dataset)
    if start is not None:
        config = continued(config)
    until = until if until is not None and until < config.training.epochs else None
    select = selection(config, artifact.uri)
    _resume_or_extend(run, artifact, select)
    work = Work(config, dataset.uri, artifact.uri, until, start)
    if _in_this_process(config, dataset.uri):
        with threads(config.scaling), interrupt.polled():
            fit(work, LocalContext(config.scaling.use_gpu), on_epoch)
    else:
        ray_workers.run(work, train_loop_per_worker, partial(_states, work), callback)
    last = CheckpointRecord.read(select.folder(select.last_epoch()))
    if until is not None and last.epoch >= until:  # else training.patience ended it before
        message = f"stopped after epoch {last.epoch} of {config.training.epochs}, as requested"
        log.info("train", message, event="stopped", values={"epoch": last.epoch})
        return last
    record = _publish(run.config, config, artifact, last.best_epoch, time.perf_counter() - started)
    run.publish(artifact)
    return record


@dataclass(frozen=True)
class Work:
    """What a training worker is told."""

    config: Config
    dataset_uri: str
    folder: str  # of the checkpoint artefact
    until: int | None
    start: WarmStart | None = None


def continued(config: Config) -> Config:
    """The configuration that a training from a checkpoint has: training.start_epochs, and a constant learning rate."""
    optim, training = config.optim, config.training
    rate = optim.start_learning_rate or optim.learning_rate / 4
    return with_values(
        config,
        {
            "training.epochs": training.start_epochs or training.epochs,
            "optim.learning_rate": rate,
            "optim.schedule": "constant",
            "optim.warmup_steps": 0,
        },
    )


def _start(run: Run, artifact: Artifact[CheckpointRecord], dataset: PreparedDataset) -> WarmStart | None:
    """The checkpoint that this training starts from. Raises LineageError if it has seen the test events of the dataset."""
    found = run.start_of(artifact.inputs)
    if found is None:
        if run.config.training.start_from is not None:
            log.info("train", "no earlier checkpoint of this model: training starts from scratch")
        return None
    root = found.uri.rpartition("/")[0].rpartition("/")[0]
    other = Run(with_values(run.config, {"run.output": root.rpartition("/")[0], "run.name": root.rpartition("/")[2]}))
    start = WarmStart.of(found.uri, PreparedDataset.at(other.dataset_of(found.record)))
    warm_start.check(start, dataset)
    log.info("train", f"starting from {found.record.id} ({found.uri})", event="start_from", values={"uri": found.uri})
    return start


def fit(work: Work, context: Context, on_epoch: OnEpoch | None = None) -> None:
    """Train on this worker until the best epoch is known; with training.refit then on train and validation events."""
    keep_memory()
    config, dataset = work.config, PreparedDataset.open(work.dataset_uri)
    local = isinstance(context, LocalContext)
    stop = interrupt.StopRequest(None if local else work.folder, context.rank)
    with tracking.training(config, dataset.record, dataset.uri, work.folder, context.rank), progress.scope():
        done = _fit_phase(work, dataset, selection(config, work.folder), context, stop, on_epoch)
        if config.training.refit and work.until is None:
            _fit_phase(work, dataset.refitted(), refit(work.folder, done.best_epoch), context, stop)


def selection(config: Config, folder: str) -> Phase:
    """The phase that trains on the train split and validates. folder: of the checkpoint artefact."""
    return Phase("train", config.training.epochs, storage.join(folder, "epochs"))


def refit(folder: str, epochs: int) -> Phase:
    """The phase that trains on train and validation events together. Another number of epochs is another schedule, so
    that it cannot resume from this one."""
    return Phase("refit", epochs, storage.join(folder, "refit", f"of-{epochs:04d}"))


def _fit_phase(
    work: Work,
    dataset: PreparedDataset,
    phase: Phase,
    context: Context,
    stop: interrupt.StopRequest,
    on_epoch: OnEpoch | None = None,
) -> TrainProgress:
    """Train or resume one phase. Its model is freed on return, before the next phase builds another."""
    trainer = Trainer(work.config, dataset, phase, context, stop, work.start)
    _resume(trainer.state, phase, context)
    return trainer.fit(on_epoch, work.until)


def _resume(state: TrainState, phase: Phase, context: Context) -> None:
    """Load the newest state on disk whose files are intact, if there is one.

    Worker 0 decides which: all must load the same one.
    """
    at = _newest_intact(phase) if context.rank == 0 else Position(0)
    chosen = context.sum(torch.tensor([at.epoch, at.steps], dtype=torch.float64))
    at = Position(*(int(number) for number in chosen))
    if at == Position(0):
        return
    state.load(phase.folder(*at))
    if names := state.non_finite():
        raise LineageError(
            f"{phase.folder(*at)} holds values that are not finite ({', '.join(names[:3])}): set training.resume = false to "
            f"start over"
        )
    if context.rank == 0:
        values = {"epoch": at.epoch, "steps": at.steps}
        log.info(phase.name, f"resuming after {at}", event="resume", values=values)


def _newest_intact(phase: Phase) -> Position:
    """The newest position on disk whose files have their digests; (0, 0) if there is none."""
    for at in phase.saved():
        try:
            checkpoint.verify(phase.folder(*at))
        except (StorageError, LineageError) as error:
            # Workers of a driver that was killed train on for some seconds, and delete old states.
            message = f"the state after {at} cannot be used, trying the one before: {error}"
            log.warning(phase.name, message, event="damaged", values={"epoch": at.epoch, "steps": at.steps})
        else:
            return at
    return Position(0)


def _resume_or_extend(run: Run, artifact: Artifact[CheckpointRecord], select: Phase) -> None:
    """A training that differs only in its number of epochs is a start, if it is the same so far."""
    shorter = None if select.saved() else _same_so_far(run, artifact, select)
    if shorter is None:
        return
    last = shorter.last_epoch()
    # The best one first: training resumes from the last one, and publishes the best.
    for epoch in sorted({last, CheckpointRecord.read(shorter.folder(last)).best_epoch}):
        storage.copy_folder(shorter.folder(epoch), select.folder(epoch))


def _same_so_far(run: Run, artifact: Artifact[CheckpointRecord], select: Phase) -> Phase | None:
    """The epochs of the longest training on disk whose keys differ in training.epochs only, if those do not depend on it.

    They do depend on it with a falling learning rate, and where not every epoch is validated: the last one always is.
    """
    config = run.config
    if not config.training.resume or config.optim.schedule != "constant" or config.training.validate_every > 1:
        return None
    found = []
    for other in artifacts_of(artifact.uri.rpartition("/")[0], CHECKPOINT):
        differ = {key for key in artifact.keys if other.keys.get(key) != artifact.keys[key]}
        if (
            other.inputs == artifact.inputs
            and other.keys.keys() == artifact.keys.keys()
            and differ == {"training.epochs"}
        ):
            found.append(Phase("train", select.epochs, selection(config, other.uri).root))
    longest = max(found, key=Phase.last_epoch, default=None)
    return longest if longest is not None and longest.last_epoch() else None


def _publish(
    given: Config, config: Config, artifact: Artifact[CheckpointRecord], epoch: int, seconds: float
) -> CheckpointRecord:
    """Copy the best epoch, or the refitted model, to the artefact. Its metric is that of the best epoch of selection.

    given: the configuration as it was given; config: as it was trained with (`continued`).
    """
    select, refits = selection(config, artifact.uri), config.training.refit
    best, last = (CheckpointRecord.read(select.folder(one)) for one in (epoch, select.last_epoch()))
    folder = refit(artifact.uri, epoch).folder(epoch) if refits else select.folder(epoch)
    update = {
        "config": given.model_dump(mode="json"),
        "seconds": seconds,
        "value": best.value,
        "best_epoch": epoch,
        "history": last.history,
        **artifact.lineage,
    }
    record = checkpoint.publish(folder, artifact.uri, CheckpointRecord.read(folder).model_copy(update=update))
    log.info(
        "train",
        f"best {record.metric} {record.value:.4f} (validation) at epoch {epoch}"
        f"{', refitted with the validation events' if refits else ''}; {seconds:.1f} s in total",
        event="published",
        values={"metric": record.metric, "value": record.value, "epoch": epoch, "refit": refits, "seconds": seconds},
    )
    return record


# Workers -------------------------------------------------------------------------------------------------------------


def _in_this_process(config: Config, dataset_uri: str) -> bool:
    """Whether this process trains: by scaling.num_workers = 0, or as the only worker on a machine without a cluster.

    A Ray worker would run the same training seconds later, after Ray and Ray Train's controller have started.
    """
    scaling = config.scaling
    if scaling.num_workers == 1 and not runtime.is_shared():
        return scaling.reader == "worker" or (scaling.reader == "auto" and "://" not in dataset_uri)
    return scaling.num_workers == 0


def _states(work: Work) -> list[str]:
    """Folders of saved states, of all phases. They change when training makes progress."""
    roots = [selection(work.config, work.folder).root]
    refits = storage.join(work.folder, "refit")
    roots += [storage.join(refits, name) for name in storage.list_folders(refits)]
    return [storage.join(root, name) for root in roots for name in storage.list_folders(root)]


def train_loop_per_worker(settings: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    import ray.train

    log.configure_worker(settings["log"])
    config = Config.model_validate(settings["config"])
    start = None if settings["start"] is None else WarmStart(**settings["start"])
    work = Work(config, settings["dataset"], settings["folder"], settings["until"], start)
    report = ray.train.report if settings["report"] else None
    context = RayContext(config.scaling, work.folder)
    with contextlib.ExitStack() as stack:
        if context.rank == 0:  # the workers of a driver that was killed train on for some seconds
            stack.enter_context(locks.exclusive(storage.join(work.folder, "workers")))
        stack.enter_context(releasing_ddp())
        stack.enter_context(threads(config.scaling, context.local_size))
        stack.enter_context(context.watchdog.watching())
        fit(work, context, report)
