"""The trials of a search in the order in which they are done: those that have earned more epochs, then new points."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from recray.records import Trial
from recray.tuning.asha import Rungs
from recray.tuning.search import Search
from recray.tuning.store import Job, SweepStore


class Jobs:
    """total: points at most. past: trials with a record. rungs: where trials wait; None where nobody does."""

    def __init__(self, ledger: SweepStore, search: Search, rungs: Rungs | None, total: int, past: list[Trial]) -> None:
        self._ledger, self._search, self._rungs = ledger, search, rungs
        self._known = {trial.number: trial for trial in past}
        self._numbers = iter(range(1, total + 1))
        self._running: set[int] = set()

    def next(self) -> Job | Literal["later"] | None:
        """None when there are no more; "later" when trials that run now decide about it."""
        rungs = self._rungs
        job = (self._lifted(rungs.lift(self.waiting())) if rungs else None) or self._new()
        if job is None and rungs:
            job = self._lifted(rungs.lift_last(self.waiting(), self._running))
        if job is None:
            return "later" if rungs and self._running else None
        self._running.add(job.number)
        return replace(job, until=rungs.next_of(job.number)) if rungs else job

    def ended(self, trial: Trial) -> None:
        """It trains no longer, for good or until it is lifted."""
        self._running.discard(trial.number)
        self._known[trial.number] = trial
        if self._rungs:
            self._rungs.hear(trial)
        self._search.learn(trial)

    def trials(self) -> list[Trial]:
        return [self._known[number] for number in sorted(self._known)]

    def waiting(self) -> set[int]:
        return {trial.number for trial in self._known.values() if trial.status == "paused"}

    def _lifted(self, number: int | None) -> Job | None:
        if number is None:
            return None
        # Written down first: were the sweep killed now, it would have to go on with this one.
        trial = self._known[number].model_copy(update={"status": "cut"})
        job = self._ledger.job(number, trial.values)
        self._ledger.end(job, trial)
        self._known[number] = trial
        return job

    def _new(self) -> Job | None:
        for number in self._numbers:
            if number in self._known and self._known[number].status != "cut":
                continue
            begun = self._ledger.begun(number)
            point = self._search.point(number, begun)
            if point is None:
                self._numbers = iter(())
                return None
            job = self._ledger.job(number, point)
            if begun is None:
                self._ledger.begin(job)
            return job
        return None
