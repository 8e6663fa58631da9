"""Asynchronous successive halving (ASHA; Li et al., MLSys 2020): which trials have earned more epochs.

A trial that comes to a rung goes on at once where it is among the best 1 / factor of those that came there so far. Else
it waits: it goes on when others that came after it have made room. Ray Tune's own ASHA decides once, when a trial comes
by, so that the first ones, which have nobody to be held against, train to their end whatever they are worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container

from recray.config import Config
from recray.records import Trial
from recray.tuning.space import Space


class Rungs:
    """After first, first * factor, first * factor^2, ... epochs, all before `longest`."""

    def __init__(self, first: int, factor: float, longest: int, mode: str) -> None:
        powers = [round(first * factor**power) for power in range(math.ceil(math.log(longest / first, factor)))]
        self.epochs = sorted({epoch for epoch in powers if epoch < longest})
        self._factor, self._sign = factor, -1.0 if mode == "max" else 1.0
        self._values: list[dict[int, float]] = [{} for _ in self.epochs]  # by number of the trial

    def reach(self, number: int, epoch: int, value: float) -> bool:
        """A trial had this value after an epoch; whether it goes on at once. Each rung hears of a trial once."""
        came_to = None
        for level, at in enumerate(self.epochs):
            if at <= epoch and number not in self._values[level]:
                self._values[level][number] = value
                came_to = level
        return came_to is None or number in self._best(came_to, math.floor)

    def lift(self, waiting: Container[int], last: bool) -> int | None:
        """The waiting trial that goes on now, of the highest rung that has one.

        last: nothing new will come, so that shares are rounded up: somebody trains to the end.
        """
        for level in reversed(range(len(self.epochs))):
            above = self._values[level + 1] if level + 1 < len(self.epochs) else {}
            for number in self._best(level, math.ceil if last else math.floor):
                if number in waiting and number not in above:
                    return number
        return None

    def _best(self, level: int, rounded: Callable[[float], int]) -> list[int]:
        values = self._values[level]
        ranked = sorted(values, key=lambda number: (self._sign * values[number], number))
        return ranked[: rounded(len(values) / self._factor)]


def make_rungs(config: Config, space: Space, mode: str, past: list[Trial]) -> Rungs | None:
    """Of `tune.scheduler = "asha"`, with what trials of earlier starts had there; None with other schedulers."""
    options = config.tune
    if options.search == "pbt" or options.scheduler != "asha":
        return None
    longest = config.training.epochs
    if "training.epochs" in space.axes:
        axis = space.axes["training.epochs"]
        longest = int(max(axis.choices or [axis.high]))
    rungs = Rungs(options.grace_epochs, options.reduction_factor, longest, mode)
    for trial in past:
        for one in trial.curve:
            rungs.reach(trial.number, one.epoch, one.value)
    return rungs
