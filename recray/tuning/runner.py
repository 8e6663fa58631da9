"""Trials through Ray Tune: its actors run them, recray decides which ones and keeps the records.

Ray Tune is used through its public hooks only. For a trial that pauses at a rung after epoch 1 they are called like this:

    Searcher.suggest           SearchQueue.next() -> trials/0007 until epoch 1
    Callback.on_trial_start    the board shows it
    Stopper.__call__           the median rule may stop it at any epoch; ASHA does not need to: the trial knows its rung
    Callback.on_trial_result   {"epoch": 1, "ended": "paused", ...}
    Callback.on_trial_complete its record is written; SearchQueue.stopped() ranks it at its rung

When it is promoted, it is another trial to Ray Tune: it starts again, with the same folder, reports its old epochs marked
"again", and resumes from its checkpoint. A killed sweep resumes in the same way. Tune's own snapshots are not used for
that: they are taken every few seconds and hold pickles.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ray import tune
from ray.tune.schedulers import FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher

from recray import layout, storage
from recray.errors import RecrayError
from recray.records import Trial, TrialEpoch
from recray.tuning.console import Board
from recray.tuning.objective import Objective
from recray.tuning.queue import SearchQueue, SeedQueue
from recray.tuning.space import Space
from recray.tuning.stopping import Rules
from recray.tuning.store import SweepStore, TrialSpec
from recray.tuning.trial import Sweep, run_trial
from recray.tuning.trial_resources import TrialResources

_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of the configuration stay valid in trials
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files next to the records
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails in its first epoch has no metric to report
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command; Tune would only end the search and go on to finalists
    "TUNE_GLOBAL_CHECKPOINT_S": "600",  # Tune's snapshots are never read
}


def run_trials(
    store: SweepStore, queue: SearchQueue | SeedQueue, rules: Rules, resources: TrialResources, board: Board
) -> list[Trial]:
    """Run trials until the queue has no more or the budget is used up, and write the record of each that stops.

    Returns the trials that the budget interrupted; the next start resumes them.
    """
    os.environ.update(_ENVIRONMENT)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    recorder = _Recorder(store, queue.stopped, rules, board)
    folder = storage.join(store.uri, "ray")
    _tuner(
        store,
        queue,
        rules,
        resources,
        tune.RunConfig(
            name=f"sweep-{int(time.time())}",
            storage_path=folder,
            callbacks=[recorder],
            stop=_Stopper(rules, Objective.of(store.config).metric),
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(num_to_keep=4) if rules.population else None,
        ),
    ).fit()
    layout.clear(folder, layout.SWEEP)
    return recorder.interrupted()


def _tuner(
    store: SweepStore,
    queue: SearchQueue | SeedQueue,
    rules: Rules,
    resources: TrialResources,
    run_config: tune.RunConfig,
) -> tune.Tuner:
    config, population = store.config, rules.population
    body = config.model_dump(mode="json", exclude_unset=True)
    trainable = tune.with_parameters(_trainable, sweep=Sweep(body, store.uri, store.dataset.uri, resources.cpus))
    # PBT needs all its members at the start, and refuses a searcher.
    members = [asdict(s) for s in iter(queue.next, None) if isinstance(s, TrialSpec)] if population else []
    return tune.Tuner(
        tune.with_resources(trainable, {"cpu": resources.cpus, "gpu": resources.gpus}),
        param_space={"trial": tune.grid_search(members)} if population else None,
        tune_config=tune.TuneConfig(
            scheduler=_population_scheduler(population) if population else FIFOScheduler(),
            search_alg=None if population else _QueueSearcher(queue.next),
            num_samples=1 if population else -1,
            max_concurrent_trials=resources.concurrent,
            # Saves the start of a process. A trainer of several workers only ends with the process that started it.
            reuse_actors=config.scaling.num_workers <= 1,
            trial_name_creator=_trial_name,
            # A promoted trial has the name of the paused one, and Tune needs another folder for it.
            trial_dirname_creator=lambda trial: f"{_trial_name(trial)}-{trial.trial_id}",
        ),
        run_config=run_config,
    )


def _trial_name(trial: Any) -> str:
    return TrialSpec(**trial.config["trial"]).name


def _trainable(config: dict[str, Any], sweep: Sweep) -> None:
    run_trial(config["trial"], sweep)


class _QueueSearcher(Searcher):  # type: ignore[misc]
    """Hands the queue's trials to Ray Tune, one whenever it asks."""

    def __init__(self, next_trial: Callable[[], TrialSpec | Literal["wait"] | None]) -> None:
        super().__init__()
        self._next_trial = next_trial

    def suggest(self, trial_id: str) -> Any:
        spec = self._next_trial()
        if spec == "wait":
            return None  # Tune asks again later
        return Searcher.FINISHED if spec is None else {"trial": asdict(spec)}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Nothing to do: the queue is told by the recorder, which knows more. Searcher requires the method."""

    def save(self, checkpoint_path: str) -> None:
        """An empty file, which Tune expects in its snapshots: the records are what a sweep resumes from."""
        Path(checkpoint_path).touch()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its tuner, and the queue cannot be pickled


class _Stopper(tune.Stopper):  # type: ignore[misc]
    """Applies the rules: the budget to the sweep, the median rule to a trial."""

    def __init__(self, rules: Rules, metric: str) -> None:
        self._rules, self._metric = rules, metric

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        median = self._rules.median
        if median is None or self._metric not in result or "failed" in result:
            return False
        epoch, value = int(result["epoch"]), float(result[self._metric])
        if result.get("again"):
            median.add(trial_id, epoch, value)
            return False
        return median.stops(trial_id, epoch, value)

    def stop_all(self) -> bool:
        return self._rules.budget.used_up()


@dataclass
class _Running:
    """A running trial. `before`: its record from an earlier start; it reports the epochs in there again, first."""

    spec: TrialSpec
    before: Trial | None
    now: Trial  # what it has reported in this start; "interrupted" unless it reports something else

    def add(self, result: dict[str, Any], objective: Objective) -> None:
        """A report: of an epoch, which may be its last one (`ended`), or of a failure (`failed`)."""
        reason = str(result.get("failed", ""))
        # Ray Tune marks the result after which a rule or scheduler stops a trial as done.
        status = "failed" if reason else result.get("ended") or ("pruned" if result.get("done") else "interrupted")
        update = {"status": status, "reason": reason}
        epoch = int(result["epoch"])
        if not reason and epoch > self.now.epochs:  # with several workers the last epoch is reported twice
            seconds = self.now.seconds + float(result["seconds"]) + float(result.get("validation_seconds", 0.0))
            curve = [*self.now.curve, *self._entry(epoch, seconds, result, objective.metric)]
            best = objective.best(one.value for one in curve)
            update |= {"epochs": epoch, "seconds": seconds, "curve": curve, "best": best}
        self.now = self.now.model_copy(update=update)

    def _entry(self, epoch: int, seconds: float, result: dict[str, Any], metric: str) -> list[TrialEpoch]:
        if metric not in result:  # an epoch without validation
            return []
        # When an epoch was reported first is only known from the earlier record.
        times = [one.at for one in (self.before.curve if self.before else []) if one.epoch == epoch]
        value, loss, at = float(result[metric]), float(result["loss"]), times[0] if times else time.time()
        return [TrialEpoch(epoch=epoch, value=value, loss=loss, seconds=seconds, at=at)]

    def trial(self) -> Trial:
        """Its record. A trial that stops before it has reported its earlier epochs again still has them on disk."""
        if self.before is None or self.before.epochs <= self.now.epochs:
            return self.now
        return self.before.model_copy(update={"status": self.now.status, "reason": self.now.reason})


class _Recorder(tune.Callback):  # type: ignore[misc]
    """Follows the running trials, writes a record when one stops, and tells the board and the queue."""

    def __init__(self, store: SweepStore, stopped: Callable[[Trial], None], rules: Rules, board: Board) -> None:
        self._objective = Objective.of(store.config)
        self._store, self._stopped, self._budget, self._board = store, stopped, rules.budget, board
        self._running: dict[str, _Running] = {}
        self._failed: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as for _QueueSearcher

    def _of(self, trial: Any) -> _Running:
        spec = TrialSpec.of(str(trial), trial.config["trial"])
        running = self._running.get(trial.trial_id)
        if running is None:
            now = Trial(number=spec.number, values=spec.values, seed=spec.seed, status="interrupted")
            running = self._running[trial.trial_id] = _Running(spec, self._store.read_trial(spec.folder), now)
        if spec.values != running.spec.values:  # PBT gave it another member's weights and new values
            switches = [*running.now.switches, {"epoch": running.now.epochs, **spec.values}]
            running.now = running.now.model_copy(update={"values": spec.values, "switches": switches})
            running.spec = spec
            self._store.write_point(spec)
        return running

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._board.running(self._of(trial).now)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        running = self._of(trial)
        running.add(result, self._objective)
        self._budget.count(running.spec.number, int(result["epoch"]))
        self._board.running(running.now)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # Still "interrupted": it was stopped from outside, by the budget or because the whole sweep ends.
        if self._of(trial).now.status != "interrupted":
            self._end(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        running = self._of(trial)
        self._failed.add(trial.trial_id)
        reason = _reason(Path(trial.error_file).read_text())
        running.now = running.now.model_copy(update={"status": "failed", "reason": reason})
        self._end(trial)

    def _end(self, trial: Any) -> None:
        running = self._running.pop(trial.trial_id)
        self._store.write_trial(running.spec, running.trial())
        self._board.stopped(running.trial())
        self._stopped(running.trial())

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tune does not report a trial whose reused process could not be reset, and would wait for it for ever."""
        for trial in trials:
            if trial.status == "ERROR" and trial.trial_id not in self._failed:
                raise RecrayError(
                    f"{trial} could not start: the process that it was given did not stop its last trial in time. "
                    f"Run the same command again; it resumes the sweep"
                )

    def interrupted(self) -> list[Trial]:
        """Write the records of the trials that still ran when the budget was used up, with the epochs they reached."""
        for running in self._running.values():
            self._store.write_trial(running.spec, running.trial())
        return [running.trial() for running in self._running.values()]


def _reason(text: str) -> str:
    """Why a trial's process ended without a report, from Ray's error text."""
    if "running low on memory" in text:
        return "its process was killed: the machine ran out of memory"
    if "died" in text:
        return "its process was killed (by a user, or by the system when memory ran out)"
    return text.strip().splitlines()[-1]


def _population_scheduler(space: Space) -> TrialScheduler:
    """Population-based training (Jaderberg et al. 2017): bad members copy the weights of good ones and vary their values."""
    mutations: dict[str, Any] = {}
    for key, axis in space.axes.items():
        draw = tune.loguniform if axis.log else tune.uniform
        values = space.values(key)
        mutations[key] = values if values is not None else draw(axis.low, axis.high)

    def clip(config: dict[str, Any]) -> dict[str, Any]:
        """Tune multiplies values by 0.8 or 1.2 and does not know their ranges."""
        values = config["trial"]["values"]
        config["trial"]["values"] = {key: space.clip(key, value) for key, value in values.items()}
        return config

    objective = Objective.of(space.base)
    return PopulationBasedTraining(
        time_attr="epoch",
        metric=objective.metric,
        mode=objective.mode,
        perturbation_interval=space.base.tune.perturb_epochs,
        hyperparam_mutations={"trial": {"values": mutations}},
        custom_explore_fn=clip,
        require_attrs=False,  # as for strict metric checking
        log_config=False,
    )
