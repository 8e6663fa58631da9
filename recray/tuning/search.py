"""Which point is tried next. A search gives the same points again after a restart, or learns them from the records."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from recray.records import Trial
from recray.tuning.objective import Objective
from recray.tuning.space import Point, Space

_MAX_REDRAWS = 200  # invalid or repeated draws in a row after which the space counts as used up
_STARTUP = 10  # random points before TPE has enough trials to model
_MAX_BALANCED = 100_000  # points of a grid whose order is planned
_DEFAULT_TRIALS = {"random": 24, "tpe": 24, "pbt": 8}


def num_trials(space: Space) -> int:
    """How many trials a search has at most."""
    options = space.base.tune
    if options.search == "grid":
        return sum(1 for _ in space.grid())
    return options.trials or _DEFAULT_TRIALS[options.search]


class GridSearch:
    """Every point of the grid, shuffled when trials may be stopped early.

    Early stopping compares a trial with those before it. In the grid's own order each may be better than the last, and
    none would be stopped.
    """

    def __init__(self, space: Space) -> None:
        self._points = list(space.grid())
        if space.base.tune.scheduler != "none":
            order = np.random.default_rng([space.base.run.seed, 8])
            order.shuffle(self._points)  # type: ignore[arg-type]

    def point(self, number: int, known: Point | None = None) -> Point | None:
        """The point of a trial (from 1); `known` if it was started before; None when there are no more."""
        if known is not None:
            return known
        return self._points[number - 1] if number <= len(self._points) else None

    def learn(self, trial: Trial) -> None:
        """A trial that finished or paused: nothing to learn from it here."""


class RandomSearch:
    """Random points, stratified: valid, each once, and every key's values as evenly used as they can be.

    A key with few values gets each of them equally often, and the counts of any two differ by at most one after every
    trial. A range, or a key with more values than there are trials, is cut into one interval per trial, of which each is
    used once (a Latin hypercube: McKay et al. 1979). Keys are drawn independently of each other. A finite space is
    searched without repetition to its end.

    Interrupted and resumed with more trials, points avoid what the earlier ones have used.
    """

    def __init__(self, space: Space, past: list[Trial]) -> None:
        self._space, self._total = space, num_trials(space)
        self._points = {trial.number: trial.values for trial in past}
        self._balanced = _balanced_grid(space, self._total)

    def point(self, number: int, known: Point | None = None) -> Point | None:
        """As of GridSearch. Points before `number` are drawn first, so that a trial's point does not depend on the order."""
        if known is not None:
            self._points[number] = known
        for one in range(1, number + 1):
            if one not in self._points and (point := self._draw(one)) is not None:
                self._points[one] = point
        return self._points.get(number)

    def learn(self, trial: Trial) -> None:
        """A trial that finished or paused: nothing to learn from it here."""

    def _draw(self, number: int) -> Point | None:
        """A new point; None when the space has no more."""
        rng = np.random.default_rng([self._space.base.run.seed, 7, number])
        seen = {repr(point) for point in self._points.values()}
        if self._balanced is None:
            for _ in range(_MAX_REDRAWS):
                point = self._stratified(rng)
                if repr(point) not in seen and self._space.valid(point):
                    return point
        # What is left of a finite space, of which random draws may find nothing in reach.
        left = self._balanced or (self._space.grid() if _is_finite(self._space) else iter(()))
        return next((point for point in left if repr(point) not in seen and self._space.valid(point)), None)

    def _stratified(self, rng: np.random.Generator) -> Point:
        point: Point = {}
        for key in self._space.axes:
            if self._space.is_active(key, point):
                used = [other[key] for other in self._points.values() if key in other]
                point[key] = self._least_used(key, used, rng)
        return point

    def _least_used(self, key: str, used: list[Any], rng: np.random.Generator) -> Any:
        space, values, total = self._space, self._space.values(key), self._total
        if values is not None and len(values) <= total and not space.axes[key].log:
            return values[_rarest([sum(value == other for other in used) for value in values], rng)]
        counts, middle = [0] * total, [space.at(key, (i + 0.5) / total) for i in range(total)]
        for value in used:
            # Several intervals of a logarithmic range may round to one integer.
            own = [i for i in range(total) if middle[i] == value] or [int(space.position(key, value) * total)]
            counts[min(own[-1], total - 1) if len(own) == 1 else min(own, key=counts.__getitem__)] += 1
        return space.at(key, (_rarest(counts, rng) + rng.random()) / total)


def _rarest(counts: list[int], rng: np.random.Generator) -> int:
    """One of the places with the lowest count, at random."""
    rare = np.flatnonzero(np.array(counts) == min(counts))
    return int(rng.choice(rare))


def _is_finite(space: Space) -> bool:
    return all(space.values(key) is not None for key in space.axes)


def _balanced_grid(space: Space, total: int) -> Iterator[Point] | None:
    """Every point of a small grid once, such that after each point the counts of any two values of a key differ by at most one.

    From a random point on, all keys step to their next value (in a random order) at once, and after the last to the first.
    After the least common multiple of their numbers of values this comes back to where it began: every value was used
    equally often. Then the same from a point that was not met yet. None for other spaces.
    """
    values = {key: space.values(key) for key in space.axes}
    sizes = [len(one) for one in values.values() if one is not None]
    if (
        any(axis.when or axis.log for axis in space.axes.values())
        or len(sizes) < len(values)
        or max(sizes) > total
        or math.prod(sizes) > _MAX_BALANCED
    ):
        return None
    rng = np.random.default_rng([space.base.run.seed, 7])
    orders = {key: [(one or [])[i] for i in rng.permutation(len(one or []))] for key, one in values.items()}
    starts = rng.permutation(math.prod(sizes))

    def points() -> Iterator[Point]:
        met: set[tuple[int, ...]] = set()
        for start in zip(*np.unravel_index(starts, sizes), strict=True):
            if tuple(map(int, start)) in met:
                continue
            for step in range(math.lcm(*sizes)):
                place = tuple((int(s) + step) % size for s, size in zip(start, sizes, strict=True))
                met.add(place)
                yield {key: order[at] for (key, order), at in zip(orders.items(), place, strict=True)}

    return points()


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
        self._random = RandomSearch(space, past)
        self._running: dict[int, tuple[Any, Point]] = {}  # number -> Optuna's trial, its values
        self._learned: dict[int, Trial] = {}
        for trial in past:
            self._running[trial.number] = self._ask(trial.values)
            self.learn(trial)

    def point(self, number: int, known: Point | None = None) -> Point | None:
        """As of GridSearch. The first points, and those after many that TPE repeats, are of RandomSearch."""
        tried = [*(trial.values for trial in self._learned.values()), *(point for _, point in self._running.values())]
        if known is None and len(tried) >= _STARTUP:
            seen = {repr(point) for point in tried}
            for _ in range(_MAX_REDRAWS):
                asked, point = self._ask(None)
                if repr(point) not in seen and self._space.valid(point):
                    self._running[number] = (asked, point)
                    self._random.point(number, point)
                    return point
                self._study.tell(asked, state=self._states.FAIL)
        chosen = self._random.point(number, known)
        if chosen is not None:
            self._running[number] = self._ask(chosen)
        return chosen

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


Search = GridSearch | RandomSearch | Tpe


def make_search(space: Space, past: list[Trial]) -> Search:
    """The search of the configuration. past: finished and paused trials of earlier starts."""
    if space.base.tune.search == "tpe":
        return Tpe(space, past)
    return GridSearch(space) if space.base.tune.search == "grid" else RandomSearch(space, past)
