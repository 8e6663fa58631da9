"""Asynchronous successive halving (ASHA; Li et al., MLSys 2020): which trials have earned more epochs.

A trial trains to a rung and waits there until it is among the best 1 / factor of those that came there so far: at once,
or when others that came after it have made room. Ray Tune's own ASHA decides once, when a trial comes by, so that the
first ones, which have nobody to be held against, train to their end whatever they are worth.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from recray.config import Config
from recray.records import Trial
from recray.tuning.space import Space


class Rungs:
    """After first, first * factor, first * factor^2, ... epochs, all before `longest`, and where there is a validation."""

    def __init__(self, first: int, factor: float, longest: int, mode: str, every: int = 1) -> None:
        powers = [first * factor**power for power in range(math.ceil(math.log(longest / first, factor)))]
        self.epochs = sorted({e for power in powers if (e := math.ceil(round(power) / every) * every) < longest})
        self._factor, self._sign = factor, -1.0 if mode == "max" else 1.0
        self._values: list[dict[int, float]] = [{} for _ in self.epochs]  # by number of the trial

    def hear(self, trial: Trial) -> None:
        """What a trial had at its rungs so far. Where it will not train again, it takes nobody's place from there on."""
        for level, at in enumerate(self.epochs):
            found = [one.value for one in trial.curve if one.epoch == at]
            if found:
                self._values[level][trial.number] = found[0]
            if trial.over and (trial.status == "failed" or trial.epochs <= at):
                self._values[level].pop(trial.number, None)

    def next_of(self, number: int) -> int | None:
        """Epochs after which a trial that trains now comes to a rung; None: to its end."""
        return next((at for at, values in zip(self.epochs, self._values, strict=True) if number not in values), None)

    def lift(self, waiting: Collection[int]) -> int | None:
        """The waiting trial that goes on now, of the highest rung that has one."""
        for level in reversed(range(len(self.epochs))):
            for number in self._ranked(level)[: math.floor(len(self._values[level]) / self._factor)]:
                if self._waits_at(number, level, waiting):
                    return number
        return None

    def lift_last(self, waiting: Collection[int], running: Collection[int]) -> int | None:
        """The same where no new trial will come: a rung that nobody is on the way to rounds its share up, so that
        somebody trains to the end."""
        for level, values in enumerate(self._values):
            if any(number not in values for number in running):
                return None
            for number in self._ranked(level)[: math.ceil(len(values) / self._factor)]:
                if self._waits_at(number, level, waiting):
                    return number
        return None

    def _waits_at(self, number: int, level: int, waiting: Collection[int]) -> bool:
        higher = self._values[level + 1] if level + 1 < len(self._values) else {}
        return number in waiting and number not in higher

    def _ranked(self, level: int) -> list[int]:
        values = self._values[level]
        return sorted(values, key=lambda number: (self._sign * values[number], number))


def make_rungs(config: Config, space: Space, mode: str, past: list[Trial]) -> Rungs | None:
    """Of `tune.scheduler = "asha"`, with what trials of earlier starts had there; None with other schedulers."""
    options = config.tune
    if options.search == "pbt" or options.scheduler != "asha":
        return None
    longest = config.training.epochs
    if "training.epochs" in space.axes:
        axis = space.axes["training.epochs"]
        longest = int(max(axis.choices or [axis.high]))
    rungs = Rungs(options.grace_epochs, options.reduction_factor, longest, mode, config.training.validate_every)
    for trial in past:
        rungs.hear(trial)
    return rungs
