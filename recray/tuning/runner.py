"""Jobs through Ray Tune: a scheduler stops trials early, Tune's actors run them. Records are ours, not Tune's.

Tune's own snapshots come every few seconds and hold pickles, so a sweep that was killed goes on from its ledger
instead: a trial that ended has its record, one that did not has its epochs on disk and reports them again first.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

from ray import tune
from ray.tune.schedulers import (
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher

from recray import storage
from recray.config import Config
from recray.errors import RecrayError
from recray.records import Trial, TrialEpoch
from recray.tuning.check import metric_of
from recray.tuning.console import Board
from recray.tuning.resources import Share
from recray.tuning.space import Space
from recray.tuning.store import Job, SweepStore
from recray.tuning.trial import run_trial

_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails in its first epoch reports none
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the board tells of them
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ctrl-c ends the sweep, and the same command goes on with it
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "600",
}


class Budget(tune.Stopper):  # type: ignore[misc]
    """Wall time that the search may still use, and epochs of all its trials; done: those of earlier starts, by trial."""

    def __init__(self, seconds: float | None, epochs: int | None, done: dict[int, int]) -> None:
        self._until = time.monotonic() + seconds if seconds is not None else math.inf
        self._epochs = epochs if epochs is not None else math.inf
        self._done = dict(done)
        self.over = False

    def count(self, number: int, epoch: int) -> None:
        """A trial has so many epochs behind it."""
        self._done[number] = max(self._done.get(number, 0), epoch)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        self.over = self.over or time.monotonic() > self._until or sum(self._done.values()) >= self._epochs
        return self.over


def run_jobs(
    ledger: SweepStore,
    next_job: Callable[[], Job | Literal["later"] | None],
    share: Share,
    scheduler: TrialScheduler,
    budget: Budget,
    board: Board,
    ended: Callable[[Trial], None],
) -> list[Trial]:
    """Do jobs until there are no more or the budget is used up. Each that ends, or waits, is written to the ledger.

    Returns the ones that the budget cut; the next start goes on with them.
    """
    os.environ.update(_ENVIRONMENT)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    config = ledger.config
    watch = _Watch(ledger, budget, board, ended)
    folder = storage.join(ledger.uri, "ray")
    base = config.model_dump(mode="json", exclude_unset=True)
    trainable = tune.with_resources(
        tune.with_parameters(_trainable, base=base, cpus=share.cpus), {"cpu": share.cpus, "gpu": share.gpus}
    )
    population = isinstance(scheduler, PopulationBasedTraining)
    jobs: list[Job] = []
    while population and (job := next_job()) is not None:  # PBT wants its members, and no search
        assert job != "later"
        jobs.append(job)
    tuner = tune.Tuner(
        trainable,
        param_space={"job": tune.grid_search([asdict(job) for job in jobs])} if population else None,
        tune_config=tune.TuneConfig(
            scheduler=scheduler,
            search_alg=None if population else _Queue(next_job),
            num_samples=1 if population else -1,
            max_concurrent_trials=share.concurrent,
            reuse_actors=config.scaling.num_workers <= 1,  # a stopped trainer of several workers ends with its process
            trial_name_creator=_name,
            trial_dirname_creator=lambda trial: f"{_name(trial)}-{trial.trial_id}",  # who waited comes again
        ),
        run_config=tune.RunConfig(
            name=f"sweep-{int(time.time())}",
            storage_path=folder,
            callbacks=[watch],
            stop=budget,
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(num_to_keep=4) if population else None,
        ),
    )
    if not population or jobs:
        tuner.fit()
    storage.delete_folder(folder)
    return watch.cut()


def _name(trial: Any) -> str:
    settings = trial.config["job"]
    return Job(**settings).name


def _trainable(config: dict[str, Any], base: dict[str, Any], cpus: int) -> None:
    run_trial(config["job"], base, cpus)


class _Queue(Searcher):  # type: ignore[misc]
    """Hands jobs to Tune, one when it asks."""

    def __init__(self, next_job: Callable[[], Job | Literal["later"] | None]) -> None:
        super().__init__()
        self._next_job = next_job

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes itself down; nothing is read from that

    def suggest(self, trial_id: str) -> Any:
        job = self._next_job()
        if job == "later":
            return None
        return Searcher.FINISHED if job is None else {"job": asdict(job)}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass  # the ledger is what a sweep goes on from

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError

    def get_state(self) -> dict[str, Any]:
        return {}


class _State:
    """What is known of a trial while it runs."""

    def __init__(self, job: Job, before: Trial | None) -> None:
        """before: the record of a trial that goes on. It reports its epochs again; when they were is known from there."""
        self.job = job
        self.curve: list[TrialEpoch] = []
        self.before = before
        self.times = {one.epoch: one.at for one in before.curve} if before else {}
        self.switches: list[dict[str, Any]] = []
        self.seconds, self.epochs, self.ended, self.pruned, self.reason = 0.0, 0, "", False, ""

    def trial(self, status: Any, mode: str) -> Trial:
        # Who stopped before it had reported everything again has not lost it.
        known = self.before if self.before and self.before.epochs > self.epochs else self
        values = [one.value for one in known.curve]
        best = (max(values) if mode == "max" else min(values)) if values else None
        return Trial(
            number=self.job.number,
            values=self.job.values,
            seed=self.job.seed,
            status=status,
            reason=self.reason,
            best=best,
            epochs=known.epochs,
            seconds=known.seconds,
            curve=known.curve,
            switches=self.switches,
        )


class _Watch(tune.Callback):  # type: ignore[misc]
    """Follows trials, writes the record of each that ends, and tells the board."""

    def __init__(self, ledger: SweepStore, budget: Budget, board: Board, ended: Callable[[Trial], None]) -> None:
        self._ledger, self._budget, self._board, self._ended = ledger, budget, board, ended
        self._metric, self._mode = metric_of(ledger.config)
        self._states: dict[str, _State] = {}
        self._failed: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as above

    def _state(self, trial: Any) -> _State:
        job = Job.of(str(trial), trial.config["job"])
        state = self._states.get(trial.trial_id)
        if state is None:
            state = self._states[trial.trial_id] = _State(job, self._ledger.read(job.folder))
        if job.values != state.job.values:  # PBT gave it another member's weights and new values
            state.job = job
            state.switches.append({"epoch": state.epochs, **job.values})
            self._ledger.begin(job)
        return state

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        state = self._state(trial)
        self._board.epoch(state.job.number, state.job.values, state.curve[-1] if state.curve else None)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        state = self._state(trial)
        state.ended, state.reason = str(result.get("ended", "")), str(result.get("failed", ""))
        state.pruned = bool(result.get("done"))  # set where the scheduler decided to stop it
        epoch = int(result["epoch"])
        self._budget.count(state.job.number, epoch)
        known = {one.epoch for one in state.curve}
        if "failed" not in result and epoch not in known:
            state.epochs = epoch
            state.seconds += float(result["seconds"]) + float(result.get("validation_seconds", 0.0))
            if self._metric in result:
                value, loss = float(result[self._metric]), float(result["loss"])
                at = state.times.get(epoch, time.time())
                state.curve.append(TrialEpoch(epoch=epoch, value=value, loss=loss, seconds=state.seconds, at=at))
        self._board.epoch(state.job.number, state.job.values, state.curve[-1] if state.curve else None)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        state = self._state(trial)
        if state.reason:
            self._end(trial, "failed")
        elif state.ended:
            self._end(trial, state.ended)
        elif state.pruned:
            self._end(trial, "pruned")
        # else the budget cut it, or something ended the whole sweep

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        state = self._state(trial)
        self._failed.add(trial.trial_id)
        with open(trial.error_file) as file:
            state.reason = _reason(file.read())
        self._end(trial, "failed")

    def _end(self, trial: Any, status: str) -> None:
        state = self._states.pop(trial.trial_id)
        made = state.trial(status, self._mode)
        self._ledger.end(state.job, made)
        self._board.end(made)
        self._ended(made)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tune says nothing of a trial whose process could not be used again, and would wait for it for ever."""
        for trial in trials:
            if trial.status == "ERROR" and trial.trial_id not in self._failed:
                raise RecrayError(
                    f"{trial} could not start: the process that it was given did not stop its last trial in time. "
                    f"Give the same command again: it goes on with the sweep"
                )

    def cut(self) -> list[Trial]:
        """The trials that ran when the budget was used up, written down with what they had reached; some have just ended."""
        states = self._states.values()
        made = [(s.job, s.trial("failed" if s.reason else s.ended or "cut", self._mode)) for s in states]
        for job, trial in made:
            self._ledger.end(job, trial)
        return [trial for _, trial in made]


def _reason(text: str) -> str:
    """Why a trial's process ended without a word, from what Ray says of it."""
    if "running low on memory" in text:
        return "its process was killed: the machine ran out of memory"
    if "died" in text:
        return "its process was killed (by hand, or by the system where memory ran out)"
    return text.strip().splitlines()[-1]


class _Median(MedianStoppingRule):  # type: ignore[misc]
    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """What an interrupted trial reports again was decided before: it went on."""
        action = super().on_trial_result(controller, trial, result)
        if result.get("again"):
            self._stopped_trials.discard(trial)
            return str(TrialScheduler.CONTINUE)
        return str(action)


class _Past:
    """Stands for a trial of an earlier start, and for a controller that has none running."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id

    def get_live_trials(self) -> list[Any]:
        return []


def make_scheduler(config: Config, space: Space, metric: str, mode: str, past: list[Trial]) -> TrialScheduler:
    """Tune's part of the configuration's scheduler, which knows the curves of trials that ended before.

    With ASHA there is none: trials end at their rungs by themselves, and `Jobs` hands them out again.
    """
    options = config.tune
    if options.search == "pbt":
        return _population(space, metric, mode)
    if options.scheduler != "median":
        return FIFOScheduler()
    scheduler = _Median(
        time_attr="epoch",
        metric=metric,
        mode=mode,
        grace_period=options.grace_epochs,
        min_samples_required=3,
        min_time_slice=math.inf,  # nobody is paused for others
    )
    for trial in past:
        stub = _Past(f"past-{trial.number}")
        scheduler.on_trial_add(stub, stub)
        for one in trial.curve:
            scheduler.on_trial_result(stub, stub, {"epoch": one.epoch, metric: one.value, "again": True})
    return scheduler


def _population(space: Space, metric: str, mode: str) -> TrialScheduler:
    mutations: dict[str, Any] = {}
    for key, axis in space.axes.items():
        values = space.values(key)
        if values is not None:
            mutations[key] = values
        else:
            mutations[key] = (tune.loguniform if axis.log else tune.uniform)(axis.low, axis.high)

    def inside(config: dict[str, Any]) -> dict[str, Any]:
        """Tune multiplies by 0.8 or 1.2 without a look at the range."""
        own = config["job"]["values"]
        config["job"]["values"] = {key: space.clip(key, value) for key, value in own.items()}
        return config

    return PopulationBasedTraining(
        time_attr="epoch",
        metric=metric,
        mode=mode,
        perturbation_interval=space.base.tune.perturb_epochs,
        hyperparam_mutations={"job": {"values": mutations}},
        custom_explore_fn=inside,
        log_config=False,
    )
