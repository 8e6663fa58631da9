"""The order in which trials run: first those that have earned more epochs, then new points.

With two trials at a time, rungs after 1 and 2 epochs and reduction_factor = 2, `next` hands out trial 1 and 2 to epoch 1.
When both have reported, the better one, say 2, is promoted and runs to epoch 2, next to new trial 3. When the points are
used up, it says "wait" until the running trials have decided which of the paused ones is promoted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from recray.records import Trial
from recray.tuning.asha import Rungs
from recray.tuning.search import Search
from recray.tuning.store import SweepStore, TrialSpec


class SearchQueue:
    """total: number of points at most. past: trials that have a record. rungs: None when trials never pause."""

    def __init__(self, store: SweepStore, search: Search, rungs: Rungs | None, total: int, past: list[Trial]) -> None:
        self._store, self._search, self._rungs = store, search, rungs
        self._trials = {trial.number: trial for trial in past}
        self._numbers = iter(range(1, total + 1))
        self._running: set[int] = set()

    def next(self) -> TrialSpec | Literal["wait"] | None:
        """The trial to start; "wait" when that depends on running trials; None when there are no more."""
        rungs = self._rungs
        spec = (self._promoted(rungs.promote(self.paused())) if rungs else None) or self._new()
        if spec is None and rungs:
            spec = self._promoted(rungs.promote_final(self.paused(), self._running))
        if spec is None:
            return "wait" if rungs and self._running else None
        self._running.add(spec.number)
        return replace(spec, until=rungs.next_rung(spec.number)) if rungs else spec

    def stopped(self, trial: Trial) -> None:
        """A trial that trains no longer, for good or until it is promoted."""
        self._running.discard(trial.number)
        self._trials[trial.number] = trial
        if self._rungs:
            self._rungs.report(trial)
        self._search.learn(trial)

    def trials(self) -> list[Trial]:
        return [self._trials[number] for number in sorted(self._trials)]

    def paused(self) -> set[int]:
        return {trial.number for trial in self._trials.values() if trial.status == "paused"}

    def _promoted(self, number: int | None) -> TrialSpec | None:
        if number is None:
            return None
        # Written first, so that a sweep that is killed from here on resumes this trial instead of leaving it paused.
        trial = self._trials[number].model_copy(update={"status": "interrupted"})
        spec = self._store.spec(number, trial.values)
        self._store.write_trial(spec, trial)
        self._trials[number] = trial
        return spec

    def _new(self) -> TrialSpec | None:
        """The next point without a record, or an interrupted trial. Numbers and points are the same in every start."""
        for number in self._numbers:
            if number in self._trials and self._trials[number].status != "interrupted":
                continue
            known = self._store.read_point(number)
            point = self._search.point(number, known)
            if point is None:
                self._numbers = iter(())
                return None
            spec = self._store.spec(number, point)
            if known is None:
                self._store.write_point(spec)
            return spec
        return None


class SeedQueue:
    """Finalists on other seeds: a fixed list, with the interface of SearchQueue."""

    def __init__(self, specs: list[TrialSpec]) -> None:
        self._specs = iter(specs)
        self.trials: list[Trial] = []

    def next(self) -> TrialSpec | None:
        return next(self._specs, None)

    def stopped(self, trial: Trial) -> None:
        self.trials.append(trial)
