"""Successive halving: who goes on, who waits, who is lifted, alone and with several trials at a time."""

import heapq
from typing import Any

import numpy as np
import pytest

from recray.config import parse_config
from recray.records import Trial, TrialEpoch
from recray.tuning.asha import Rungs, make_rungs
from recray.tuning.check import check
from recray.tuning.queue import Jobs
from recray.tuning.store import Job


def test_rungs_lie_before_the_last_epoch() -> None:
    assert Rungs(2, 4, 24, "max").epochs == [2, 8]
    assert Rungs(1, 3, 27, "max").epochs == [1, 3, 9]
    assert Rungs(1, 3, 28, "max").epochs == [1, 3, 9, 27]
    assert Rungs(1, 1.5, 4, "max").epochs == [1, 2, 3]  # 1.5 and 2.25 are both 2
    assert Rungs(4, 4, 4, "max").epochs == [] and Rungs(1, 4, 1, "max").epochs == []


def test_rungs_lie_where_there_is_a_validation() -> None:
    assert Rungs(1, 4, 24, "max", every=3).epochs == [3, 6, 18]
    assert Rungs(1, 2, 9, "max", every=4).epochs == [4, 8]


def _trial(number: int, values: list[float], status: Any = "paused") -> Trial:
    curve = [TrialEpoch(epoch=i + 1, value=v, loss=1.0, seconds=1.0, at=0.0) for i, v in enumerate(values)]
    return Trial(number=number, values={"at": number}, seed=1, status=status, epochs=len(values), curve=curve)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_first_waits_until_there_is_somebody_to_be_better_than(mode: str) -> None:
    sign = 1 if mode == "max" else -1
    rungs = Rungs(1, 2, 8, mode)
    rungs.hear(_trial(1, [sign * 0.5]))
    assert rungs.lift({1}) is None
    rungs.hear(_trial(2, [sign * 0.6]))
    assert rungs.lift({1, 2}) == 2 and rungs.lift({1}) is None  # room for one of two
    rungs.hear(_trial(3, [sign * 0.7]))
    assert rungs.lift({1, 3}) == 3  # room for one of three, and 3 is it now
    assert rungs.lift({1}) is None
    rungs.hear(_trial(4, [sign * 0.1]))
    assert rungs.lift({1, 4}) is None  # room for two of four, and 2 and 3 have it
    rungs.hear(_trial(5, [sign * 0.2]))
    rungs.hear(_trial(6, [sign * 0.3]))
    assert rungs.lift({1, 4, 5, 6}) == 1  # room for three of six


def test_higher_rungs_come_first_and_nobody_is_lifted_twice_from_one() -> None:
    rungs = Rungs(1, 2, 4, "max")  # rungs at 1 and 2
    for number, value in ((1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)):
        rungs.hear(_trial(number, [value]))
    assert rungs.next_of(4) == 2 and rungs.next_of(5) == 1
    rungs.hear(_trial(4, [0.4, 0.4]))
    assert rungs.next_of(4) is None
    assert rungs.lift({1, 2, 3, 4}) == 3  # 4 waits at rung 2, where it is alone
    rungs.hear(_trial(3, [0.3, 0.3]))
    assert rungs.lift({1, 2, 3, 4}) == 4
    assert rungs.lift({1, 2, 3}) is None


def test_where_nothing_new_will_come_somebody_trains_to_the_end() -> None:
    rungs = Rungs(1, 2, 16, "max")
    rungs.hear(_trial(3, [0.1]))
    assert rungs.lift({3}) is None and rungs.lift_last({3}, {2}) is None  # 2 is on its way to the rung
    assert rungs.lift_last({3}, set()) == 3


def test_who_will_not_go_on_takes_nobody_s_place() -> None:
    rungs = Rungs(2, 4, 24, "max")
    for number, value in ((1, 0.4), (2, 0.3), (3, 0.2), (4, 0.1)):
        rungs.hear(_trial(number, [value] * 2))
    assert rungs.lift({1, 2, 3, 4}) == 1
    rungs.hear(_trial(1, [0.4] * 4, "failed"))
    assert rungs.lift({2, 3, 4}) is None  # of three, none yet
    assert rungs.lift_last({2, 3, 4}, set()) == 2
    rungs.hear(_trial(2, [0.3] * 2, "done"))  # it had two epochs in all
    assert rungs.lift_last({3, 4}, set()) == 3


class _Memory:
    """A ledger and a search in one, of points that are numbers."""

    def __init__(self) -> None:
        self.records: dict[int, Trial] = {}

    def job(self, number: int, values: Any) -> Job:
        return Job(f"trials/{number:04d}", values, 1)

    def begun(self, number: int) -> Any:
        return {"at": number} if number in self.records else None

    def begin(self, job: Job) -> None:
        pass

    def end(self, job: Job, trial: Trial) -> None:
        self.records[trial.number] = trial

    def point(self, number: int, known: Any) -> Any:
        return {"at": number}

    def learn(self, trial: Trial) -> None:
        self.records[trial.number] = trial


def _simulate(
    values: np.ndarray, rungs: Rungs, at_once: int, memory: _Memory, fails: tuple[int, int] = (0, 0)
) -> dict[int, Trial]:
    """Trials of one time unit an epoch, `at_once` of them; row n - 1 of values is trial n's; fails: number, epochs."""
    trials, longest = values.shape
    jobs = Jobs(memory, memory, rungs, trials, list(memory.records.values()))  # type: ignore[arg-type]
    running: list[tuple[int, int, int]] = []  # ends at, number, epochs then
    now = 0
    while True:
        job: Any = None
        while len(running) < at_once and isinstance(job := jobs.next(), Job):
            before = memory.records[job.number].epochs if job.number in memory.records else 0
            until = min(job.until or longest, fails[1] if job.number == fails[0] else longest)
            assert until > before
            heapq.heappush(running, (now + until - before, job.number, until))
        if not running:
            assert job is None  # "later" with nobody running would wait for ever
            return {trial.number: trial for trial in jobs.trials()}
        now, number, epochs = heapq.heappop(running)
        status = "failed" if (number, epochs) == fails else "done" if epochs == longest else "paused"
        jobs.ended(_trial(number, list(values[number - 1, :epochs]), status))


@pytest.mark.parametrize("at_once", [1, 2, 8, 27])
@pytest.mark.parametrize("seed", range(8))
def test_at_the_end_the_best_of_every_rung_have_gone_on_and_little_else_has(seed: int, at_once: int) -> None:
    """Random curves: of every rung a share of at least 1 / factor, the best of it, went on."""
    rng = np.random.default_rng(seed)
    factor, longest = 3, 20
    values = rng.random((27, longest)).cumsum(1)
    rungs = Rungs(1, factor, longest, "max")
    trials = _simulate(values, rungs, at_once, _Memory())
    assert len(trials) == 27
    for epoch in rungs.epochs:
        came = [number for number, trial in trials.items() if trial.epochs >= epoch]
        best = sorted(came, key=lambda number: -values[number - 1, epoch - 1])[: -(-len(came) // factor)]
        assert all(trials[number].epochs > epoch for number in best)
    trained = [trial.epochs for trial in trials.values()]
    assert min(trained) == 1 and max(trained) == longest
    # All 27 came to the first rung, where 9 go on; those who were among the best at their time and are not now add to it.
    assert 9 <= sum(epochs > 1 for epochs in trained) <= 18


def test_many_at_a_time_wait_for_each_other_where_nothing_new_will_come() -> None:
    values = np.arange(1, 5)[:, None] * np.ones(8)  # the worst arrives first
    trials = _simulate(values, Rungs(1, 4, 8, "max"), 4, _Memory())
    assert [trials[number].epochs for number in (1, 2, 3, 4)] == [1, 1, 1, 8]


def test_where_the_best_fails_the_next_trains_to_its_end() -> None:
    values = np.array([0.4, 0.3, 0.2, 0.1])[:, None] * np.ones(24)
    trials = _simulate(values, Rungs(2, 4, 24, "max"), 1, _Memory(), (1, 5))
    assert [trials[n].status for n in (1, 2, 3, 4)] == ["failed", "done", "paused", "paused"]


def test_a_restart_goes_on_with_what_ran_and_knows_its_values() -> None:
    """1 and 2 ran beyond the first rung when the sweep was cut: 3 and 4, which wait there, are not lifted in their place."""
    memory, rungs = _Memory(), Rungs(1, 2, 8, "max")
    for number, values, status in (
        (1, [0.9] * 2, "cut"),
        (2, [0.8] * 2, "cut"),
        (3, [0.1], "paused"),
        (4, [0.2], "paused"),
    ):
        memory.records[number] = _trial(number, values, status)
        rungs.hear(memory.records[number])
    jobs = Jobs(memory, memory, rungs, 4, list(memory.records.values()))  # type: ignore[arg-type]
    first = [jobs.next(), jobs.next()]
    assert [(job.number, job.until) for job in first if isinstance(job, Job)] == [(1, 4), (2, 4)]
    assert jobs.next() == "later"


def test_who_is_lifted_is_written_down_as_one_that_must_go_on() -> None:
    """So that a sweep that is killed then does not leave it waiting."""
    memory, rungs = _Memory(), Rungs(1, 2, 8, "max")
    for number, value in ((1, 0.1), (2, 0.2)):
        memory.records[number] = _trial(number, [value])
        rungs.hear(memory.records[number])
    jobs = Jobs(memory, memory, rungs, 2, list(memory.records.values()))  # type: ignore[arg-type]
    job = jobs.next()
    assert isinstance(job, Job) and job.number == 2
    assert memory.records[2].status == "cut" and memory.records[2].epochs == 1
    assert jobs.waiting() == {1}


def test_more_trials_later_find_room() -> None:
    """Four that have ended, their epochs gone from disk, do not hold the places of four new ones."""
    past = [_trial(1, [0.9] * 8, "done"), *(_trial(n, [1 - n / 10], "pruned") for n in (2, 3, 4))]
    config, space = _sweep()
    rungs = make_rungs(config, space, "max", past)
    assert rungs is not None and rungs.epochs == [1, 2, 4]
    memory = _Memory()
    memory.records = {trial.number: trial for trial in past}
    values = np.concatenate([np.zeros((4, 8)), np.array([0.5, 0.4, 0.3, 0.2])[:, None] * np.ones(8)])
    trials = _simulate(values, rungs, 1, memory)
    assert [trials[n].epochs for n in (1, 2, 3, 4)] == [8, 1, 1, 1]
    assert trials[5].epochs > 1 and trials[8].epochs == 1


def _sweep() -> Any:
    tune = {"reduction_factor": 2, "space": {"model.dim": {"choices": [8, 16]}}}
    config = parse_config({"data": {"source": "simulated"}, "tune": tune, "training": {"epochs": 8}})
    return config, check(config, [])
