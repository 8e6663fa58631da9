"""Which point is tried next. Every search gives the same points again after a restart, or learns them from the records."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

import numpy as np

from recray.errors import ConfigError
from recray.records import Trial
from recray.tuning.space import Point, Space

_REDRAWS = 200  # draws without a new point after which a space counts as used up
_STARTUP = 10  # random points before TPE has anything to go by


class Search(Protocol):
    def point(self, number: int, known: Point | None = None) -> Point | None:
        """The point of a trial (from 1), `known` where it was begun before; None when there are no more."""
        ...

    def learn(self, trial: Trial) -> None:
        """A trial that ended, or waits."""
        ...


class Listed:
    """A fixed order of points: random ones without repetitions, or a grid's."""

    def __init__(self, space: Space, grid: bool) -> None:
        self._points: list[Point] = []
        self._more = _grid(space) if grid else _random(space)

    def point(self, number: int, known: Point | None = None) -> Point | None:
        if known is not None:
            return known
        self._points += itertools.islice(self._more, max(0, number - len(self._points)))
        return self._points[number - 1] if number <= len(self._points) else None

    def learn(self, trial: Trial) -> None:
        pass


def _grid(space: Space) -> Iterator[Point]:
    """In a random order where trials may be ended early: they are held against those before, and in a grid's own order
    each could be better than the last."""
    if space.base.tune.scheduler == "none":
        return space.grid()
    points = list(space.grid())
    np.random.default_rng([space.base.run.seed, 8]).shuffle(points)  # type: ignore[arg-type]
    return iter(points)


def _random(space: Space) -> Any:
    """Valid points, each once."""
    rng = np.random.default_rng([space.base.run.seed, 7])
    seen: set[str] = set()
    missed = 0
    while missed < _REDRAWS:
        point = space.draw(rng)
        if repr(point) in seen or not space.valid(point):
            missed += 1
            continue
        missed = 0
        seen.add(repr(point))
        yield point


class Tpe:
    """Optuna's multivariate tree-structured Parzen estimator (Bergstra et al. 2011; Falkner et al. 2018).

    Keys with conditions are modelled in groups that occur together; trials that are still running count as bad, so that
    two at a time do not get the same point.
    """

    def __init__(self, space: Space, mode: str, past: list[Trial]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                multivariate=True,
                group=True,
                constant_liar=True,
                n_startup_trials=_STARTUP,
                seed=space.base.run.seed * 100_003 + len(past),
            )
        direction = "maximize" if mode == "max" else "minimize"
        self._optuna, self._space = optuna, space
        self._new_study = partial(optuna.create_study, sampler=sampler, direction=direction)
        self._study = self._new_study()
        self._asked: dict[int, tuple[Any, Point]] = {}  # running: the study's own trial, and its values
        self._told: dict[int, Trial] = {}
        for trial in past:
            self._asked[trial.number] = self._ask(trial.values)
            self.learn(trial)

    def point(self, number: int, known: Point | None = None) -> Point | None:
        for _ in range(_REDRAWS):
            asked, point = self._ask(known)
            if known is not None or self._space.valid(point):
                self._asked[number] = (asked, point)
                return point
            self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)
        raise ConfigError(f"{_REDRAWS} points in a row are refused by the configuration: check tune.space")

    def _ask(self, known: Point | None) -> tuple[Any, Point]:
        space = self._space
        if known is not None:
            # A choice is known to Optuna by its place.
            fixed = {k: space.axes[k].choices.index(v) if space.axes[k].choices else v for k, v in known.items()}  # type: ignore[union-attr]
            self._study.enqueue_trial(fixed)
        asked = self._study.ask()
        point: Point = {}
        for key, axis in space.axes.items():
            if not space.counts(key, point):
                continue
            if axis.choices is not None:
                point[key] = axis.choices[asked.suggest_categorical(key, list(range(len(axis.choices))))]
            elif key in space.whole:
                step = int(axis.step or 1)
                point[key] = asked.suggest_int(key, int(axis.low or 0), int(axis.high or 0), step=step, log=axis.log)
            else:
                point[key] = asked.suggest_float(key, axis.low, axis.high, step=axis.step, log=axis.log)
        return asked, point

    def learn(self, trial: Trial) -> None:
        again = trial.number in self._told  # it had waited, and the study would count it twice
        self._told[trial.number] = trial
        if again:
            self._study = self._new_study()
            for one in self._told.values():
                self._tell(self._ask(one.values)[0], one)
            self._asked = {number: self._ask(point) for number, (_, point) in self._asked.items()}
        else:
            self._tell(self._asked.pop(trial.number)[0], trial)

    def _tell(self, asked: Any, trial: Trial) -> None:
        state = self._optuna.trial.TrialState
        if trial.status == "failed" or trial.best is None:
            self._study.tell(asked, state=state.FAIL)
        elif trial.status in ("paused", "pruned"):
            for one in trial.curve:
                asked.report(one.value, one.epoch)
            self._study.tell(asked, state=state.PRUNED)
        else:
            self._study.tell(asked, trial.best)


def make(space: Space, mode: str, past: list[Trial]) -> Search:
    """The search of the configuration, which knows the trials that ended before."""
    if space.base.tune.search == "tpe":
        return Tpe(space, mode, past)
    return Listed(space, grid=space.base.tune.search == "grid")
