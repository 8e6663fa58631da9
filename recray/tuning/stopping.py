"""What ends trials besides ASHA: the sweep's budget, and the median stopping rule. No Ray in here.

The median stopping rule (Golovin et al., KDD 2017) stops a trial at an epoch when its best value so far is worse than
the median of the other trials' mean values up to that epoch. At epoch 2, higher is better:

    trial 1: 0.2 0.4 0.5     mean of two epochs 0.30
    trial 2: 0.3 0.5 0.6                        0.40     median 0.40
    trial 3: 0.4 0.6 0.7                        0.50
    trial 4: 0.1 0.35        best 0.35 < 0.40: stopped
"""

from __future__ import annotations

import math
import time

import numpy as np

from recray.records import Trial
from recray.tuning.objective import Objective
from recray.tuning.space import Space

_MIN_TRIALS = 3  # a median of fewer is not worth stopping for


class Budget:
    """Wall time that the search may still use, and a limit on the epochs of all its trials together.

    epochs_done: trial number -> epochs completed in earlier starts.
    """

    def __init__(self, seconds: float | None, epochs: int | None, epochs_done: dict[int, int]) -> None:
        self._deadline = time.monotonic() + seconds if seconds is not None else math.inf
        self._limit = epochs if epochs is not None else math.inf
        self._epochs_done = dict(epochs_done)
        self.exhausted = False  # whether it has stopped the search

    def count(self, number: int, epoch: int) -> None:
        """A trial has completed an epoch. A resumed trial reports its earlier epochs again; they count once."""
        self._epochs_done[number] = max(self._epochs_done.get(number, 0), epoch)

    def used_up(self) -> bool:
        """Asked while the search runs; an answer of True stops it."""
        reached = time.monotonic() > self._deadline or sum(self._epochs_done.values()) >= self._limit
        self.exhausted = self.exhausted or reached
        return self.exhausted


class MedianRule:
    """Trials are known by any key that is unique to them; past: trials of earlier starts, to be compared with."""

    def __init__(self, grace_epochs: int, objective: Objective, past: list[Trial]) -> None:
        self._grace, self._objective = grace_epochs, objective
        self._curves: dict[str, list[tuple[int, float]]] = {}  # (epoch, value) in the order of reporting
        for trial in past:
            for one in trial.curve:
                self.add(f"past-{trial.number}", one.epoch, one.value)

    def add(self, key: str, epoch: int, value: float) -> None:
        """Record a value without a decision: it was made when the epoch was first reported."""
        self._curves.setdefault(key, []).append((epoch, value))

    def stops(self, key: str, epoch: int, value: float) -> bool:
        """Record a value, and decide whether the trial stops."""
        self.add(key, epoch, value)
        if epoch < self._grace:
            return False
        # Compared with trials that got as far: those stopped earlier were worse, and would lower the bar.
        others = [curve for other, curve in self._curves.items() if other != key and curve[-1][0] >= epoch]
        means = [mean for curve in others if math.isfinite(mean := self._mean(curve, epoch))]
        if len(means) < _MIN_TRIALS:
            return False
        best, median = self._objective.best(v for _, v in self._curves[key]), float(np.median(means))
        assert best is not None
        return self._objective.best([median, best]) != best

    def _mean(self, curve: list[tuple[int, float]], epoch: int) -> float:
        values = [value for at, value in curve if self._grace <= at <= epoch]
        return float(np.mean(values)) if values else math.nan


class Rules:
    """What may stop or change trials while they run: a budget, the median rule, population-based training over a space."""

    def __init__(self, budget: Budget, median: MedianRule | None = None, population: Space | None = None) -> None:
        self.budget, self.median, self.population = budget, median, population
