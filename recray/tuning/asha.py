"""Asynchronous successive halving (ASHA; Li et al., MLSys 2020): which trials have earned more epochs.

A trial trains to a rung and pauses there. It is promoted, that is, trains on to the next rung, as soon as it is among
the best 1 / factor of the trials that have reported at its rung. With factor = 2 and these values (higher is better):

    reported at rung 0    quota        promoted
    trial 1: 0.50         1 // 2 = 0   -
    trial 2: 0.60         2 // 2 = 1   2
    trial 3: 0.40         3 // 2 = 1   -          (2 has the place)
    trial 4: 0.55         4 // 2 = 2   4
    trial 5: 0.30         5 // 2 = 2   -          (2 and 4 have the places)
    trial 6: 0.20         6 // 2 = 3   1          (it was paused since it reported)

Ray Tune's ASHAScheduler decides once, when a trial reports. The first trials then have nothing to be compared with and
train to the end whatever they are worth; a sweep with pausing and promotion needs a fraction of the epochs.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from recray.records import Trial
from recray.tuning.objective import Objective
from recray.tuning.space import Space


class Rungs:
    """Rungs after first, first * factor, first * factor^2, ... epochs, all before the last epoch of a trial.

    Trials are known by their numbers. `every`: epochs between validations; rungs are moved up to the next validation,
    because without a value there is nothing to compare.
    """

    def __init__(self, first: int, factor: float, longest: int, mode: str, every: int = 1) -> None:
        powers = [first * factor**power for power in range(math.ceil(math.log(longest / first, factor)))]
        self.epochs = sorted({e for power in powers if (e := math.ceil(round(power) / every) * every) < longest})
        self._factor, self._sign = factor, -1.0 if mode == "max" else 1.0
        self._values: list[dict[int, float]] = [{} for _ in self.epochs]  # one a rung: trial -> value

    def report(self, trial: Trial) -> None:
        """Record the values of a trial that has stopped, for good or at a rung."""
        for level, epoch in enumerate(self.epochs):
            found = [one.value for one in trial.curve if one.epoch == epoch]
            if found:
                self._values[level][trial.number] = found[0]
            # A finished trial keeps its place at the rungs that it has passed. At the rung where it ended it could never
            # be promoted: counting it there would only block a paused trial. A failed one counts nowhere.
            if trial.finished and (trial.status == "failed" or trial.epochs <= epoch):
                self._values[level].pop(trial.number, None)

    def next_rung(self, number: int) -> int | None:
        """The epoch at which a trial that trains now pauses; None when it trains to the end."""
        return next((e for e, values in zip(self.epochs, self._values, strict=True) if number not in values), None)

    def promote(self, paused: Collection[int]) -> int | None:
        """The paused trial to train now, if one has earned it; higher rungs first, since they are nearer to a result."""
        for level in reversed(range(len(self.epochs))):
            # Rounded down: of three trials with factor = 4 none is promoted yet.
            for number in self._ranked(level)[: math.floor(len(self._values[level]) / self._factor)]:
                if self._can_leave(number, level, paused):
                    return number
        return None

    def promote_final(self, paused: Collection[int], running: Collection[int]) -> int | None:
        """The paused trial to train now, given that no new trials will start.

        The quota of a rung is rounded up when no running trial can reach it any more, so that at least one trial
        completes: with factor = 4 and 3 trials `promote` would leave all of them paused for ever.
        """
        for level, values in enumerate(self._values):
            if any(number not in values for number in running):
                return None  # a running trial will report at this rung and may still change the ranking
            for number in self._ranked(level)[: math.ceil(len(values) / self._factor)]:
                if self._can_leave(number, level, paused):
                    return number
        return None

    def _can_leave(self, number: int, level: int, paused: Collection[int]) -> bool:
        """Whether a trial is paused at just this rung: not running, and without a value at the next one."""
        higher = self._values[level + 1] if level + 1 < len(self._values) else {}
        return number in paused and number not in higher

    def _ranked(self, level: int) -> list[int]:
        """Best first; of equal values the earlier trial, so that the order does not depend on arrival."""
        values = self._values[level]
        return sorted(values, key=lambda number: (self._sign * values[number], number))


def make_rungs(space: Space, past: list[Trial]) -> Rungs | None:
    """The rungs of `tune.scheduler = "asha"`, with the values of earlier starts; None with other schedulers."""
    config, options = space.base, space.base.tune
    if options.search == "pbt" or options.scheduler != "asha":
        return None
    longest = config.training.epochs
    if "training.epochs" in space.axes:
        axis = space.axes["training.epochs"]
        longest = int(max(axis.choices or [axis.high]))
    mode = Objective.of(config).mode
    rungs = Rungs(options.grace_epochs, options.reduction_factor, longest, mode, config.training.validate_every)
    for trial in past:
        rungs.report(trial)
    return rungs
