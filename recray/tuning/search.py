"""Which point is tried next. A search gives the same points again after a restart, or learns them from the records."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from recray.errors import ConfigError
from recray.records import Trial
from recray.tuning.objective import Objective
from recray.tuning.space import Point, Space

_MAX_REDRAWS = 200  # invalid or repeated draws in a row after which the space counts as used up
_STARTUP = 10  # random points before TPE has enough trials to model


class PointList:
    """A fixed order of points: a grid's, or random ones without repetitions."""

    def __init__(self, points: Iterator[Point]) -> None:
        self._points: list[Point] = []
        self._more = points

    def point(self, number: int, known: Point | None = None) -> Point | None:
        """The point of a trial (from 1); `known` if it was started before; None when there are no more."""
        if known is not None:
            return known
        self._points += itertools.islice(self._more, max(0, number - len(self._points)))
        return self._points[number - 1] if number <= len(self._points) else None

    def learn(self, trial: Trial) -> None:
        """A trial that finished or paused: nothing to learn from it here."""


def grid_points(space: Space) -> Iterator[Point]:
    """Every point of the grid, shuffled when trials may be stopped early.

    Early stopping compares a trial with those before it. In the grid's own order each may be better than the last, and
    none would be stopped.
    """
    if space.base.tune.scheduler == "none":
        return space.grid()
    points = list(space.grid())
    order = np.random.default_rng([space.base.run.seed, 8])
    order.shuffle(points)  # type: ignore[arg-type]
    return iter(points)


def random_points(space: Space) -> Iterator[Point]:
    """Valid points, each once."""
    rng = np.random.default_rng([space.base.run.seed, 7])
    seen: set[str] = set()
    redraws = 0
    while redraws < _MAX_REDRAWS:
        point = space.draw(rng)
        if repr(point) in seen or not space.valid(point):
            redraws += 1
            continue
        redraws = 0
        seen.add(repr(point))
        yield point


class Tpe:
    """Optuna's multivariate tree-structured Parzen estimator (Bergstra et al. 2011; Falkner et al. 2018).

    Conditional keys are modelled in groups that occur together. Running trials count as bad (constant liar), so that
    two trials at a time do not get the same point.
    """

    def __init__(self, space: Space, past: list[Trial]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                multivariate=True,
                group=True,
                constant_liar=True,
                n_startup_trials=_STARTUP,
                # With the same seed a resumed search would draw the points of its first start again.
                seed=space.base.run.seed * 100_003 + len(past),
            )
        direction = "maximize" if Objective.of(space.base).mode == "max" else "minimize"
        self._new_study = partial(optuna.create_study, sampler=sampler, direction=direction)
        self._states, self._space, self._study = optuna.trial.TrialState, space, self._new_study()
        self._running: dict[int, tuple[Any, Point]] = {}  # number -> Optuna's trial, its values
        self._learned: dict[int, Trial] = {}
        for trial in past:
            self._running[trial.number] = self._ask(trial.values)
            self.learn(trial)

    def point(self, number: int, known: Point | None = None) -> Point | None:
        for _ in range(_MAX_REDRAWS):
            asked, point = self._ask(known)
            if known is not None or self._space.valid(point):
                self._running[number] = (asked, point)
                return point
            self._study.tell(asked, state=self._states.FAIL)
        raise ConfigError(
            f"tune.space: the configuration refuses {_MAX_REDRAWS} points in a row. Narrow the ranges, or add conditions"
        )

    def learn(self, trial: Trial) -> None:
        known_before = trial.number in self._learned
        self._learned[trial.number] = trial
        if not known_before:
            self._tell(self._running.pop(trial.number)[0], trial)
            return
        # A promoted trial has a newer value, and a study cannot change a trial: build it again with each trial once.
        self._study = self._new_study()
        for one in self._learned.values():
            self._tell(self._ask(one.values)[0], one)
        self._running = {number: self._ask(point) for number, (_, point) in self._running.items()}

    def _ask(self, known: Point | None) -> tuple[Any, Point]:
        """A trial of the study and its values, which are `known` if given."""
        space = self._space
        if known is not None:
            choices = {key: space.axes[key].choices for key in known}
            # Optuna knows a choice by its index, so that values of any type may be choices.
            self._study.enqueue_trial({k: own.index(v) if (own := choices[k]) else v for k, v in known.items()})
        asked = self._study.ask()
        point: Point = {}
        for key, axis in space.axes.items():
            if not space.is_active(key, point):
                continue
            if axis.choices is not None:
                point[key] = axis.choices[asked.suggest_categorical(key, list(range(len(axis.choices))))]
            elif key in space.whole:
                step = int(axis.step or 1)
                point[key] = asked.suggest_int(key, int(axis.low or 0), int(axis.high or 0), step=step, log=axis.log)
            else:
                point[key] = asked.suggest_float(key, axis.low, axis.high, step=axis.step, log=axis.log)
        return asked, point

    def _tell(self, asked: Any, trial: Trial) -> None:
        if trial.status == "failed" or trial.best is None:
            self._study.tell(asked, state=self._states.FAIL)
        elif trial.status in ("paused", "pruned"):
            for one in trial.curve:
                asked.report(one.value, one.epoch)
            self._study.tell(asked, state=self._states.PRUNED)
        else:
            self._study.tell(asked, trial.best)


Search = PointList | Tpe


def make_search(space: Space, past: list[Trial]) -> Search:
    """The search of the configuration. past: finished and paused trials of earlier starts."""
    if space.base.tune.search == "tpe":
        return Tpe(space, past)
    return PointList(grid_points(space) if space.base.tune.search == "grid" else random_points(space))
