"""The trials of a search in the order in which they are done: those that have earned more epochs, then new points."""

from __future__ import annotations

from typing import Literal

from recray.records import Trial
from recray.tuning.halving import Rungs
from recray.tuning.ledger import Job, Ledger
from recray.tuning.search import Search


class Jobs:
    """total: points at most. past: trials with a record. rungs: where trials wait; None where nobody does."""

    def __init__(self, ledger: Ledger, search: Search, rungs: Rungs | None, total: int, past: list[Trial]) -> None:
        self._ledger, self._search, self._rungs = ledger, search, rungs
        self._known = {trial.number: trial for trial in past}
        self._numbers = iter(range(1, total + 1))
        self._running: set[int] = set()

    def next(self) -> Job | Literal["later"] | None:
        """None when there are no more; "later" when trials that run now decide about it."""
        job = self._lifted(last=False) or self._new() or self._lifted(last=True)
        if job is None:
            return "later" if self._rungs is not None and self._running else None
        self._running.add(job.number)
        return job

    def ended(self, trial: Trial) -> None:
        """It trains no longer, for good or until it is lifted."""
        self._running.discard(trial.number)
        self._known[trial.number] = trial
        self._search.learn(trial)

    def trials(self) -> list[Trial]:
        return [self._known[number] for number in sorted(self._known)]

    def waiting(self) -> set[int]:
        waits = {trial.number for trial in self._known.values() if trial.status == "paused"}
        return waits - self._running

    def _lifted(self, last: bool) -> Job | None:
        number = self._rungs.lift(self.waiting(), last) if self._rungs is not None else None
        return None if number is None else self._ledger.job(number, self._known[number].values)

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
