"""Successive halving: which trials pause and which are promoted, with one and with several trials at a time."""

import heapq
from typing import Any

import numpy as np
import pytest

from recray.config import parse_config
from recray.records import Trial, TrialEpoch
from recray.tuning.asha import Rungs, make_rungs
from recray.tuning.check import check
from recray.tuning.queue import SearchQueue
from recray.tuning.store import TrialSpec


def test_rungs_lie_before_the_last_epoch() -> None:
    assert Rungs(2, 4, 24, "max").epochs == [2, 8]
    assert Rungs(1, 3, 27, "max").epochs == [1, 3, 9]
    assert Rungs(1, 3, 28, "max").epochs == [1, 3, 9, 27]
    assert Rungs(1, 1.5, 4, "max").epochs == [1, 2, 3]  # 1.5 and 2.25 both round to 2
    assert Rungs(4, 4, 4, "max").epochs == [] and Rungs(1, 4, 1, "max").epochs == []


def test_rungs_lie_where_there_is_a_validation() -> None:
    assert Rungs(1, 4, 24, "max", every=3).epochs == [3, 6, 18]
    assert Rungs(1, 2, 9, "max", every=4).epochs == [4, 8]


def _trial(number: int, values: list[float], status: Any = "paused") -> Trial:
    curve = [TrialEpoch(epoch=i + 1, value=v, loss=1.0, seconds=1.0, at=0.0) for i, v in enumerate(values)]
    return Trial(number=number, values={"at": number}, seed=1, status=status, epochs=len(values), curve=curve)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_trial_is_promoted_once_it_is_among_the_best_share(mode: str) -> None:
    sign = 1 if mode == "max" else -1
    rungs = Rungs(1, 2, 8, mode)
    rungs.report(_trial(1, [sign * 0.5]))
    assert rungs.promote({1}) is None
    rungs.report(_trial(2, [sign * 0.6]))
    assert rungs.promote({1, 2}) == 2 and rungs.promote({1}) is None  # quota one of two
    rungs.report(_trial(3, [sign * 0.7]))
    assert rungs.promote({1, 3}) == 3  # quota one of three, and 3 is the best now
    assert rungs.promote({1}) is None
    rungs.report(_trial(4, [sign * 0.1]))
    assert rungs.promote({1, 4}) is None  # quota two of four, taken by 2 and 3
    rungs.report(_trial(5, [sign * 0.2]))
    rungs.report(_trial(6, [sign * 0.3]))
    assert rungs.promote({1, 4, 5, 6}) == 1  # quota three of six


def test_higher_rungs_come_first_and_a_trial_is_promoted_once_from_each() -> None:
    rungs = Rungs(1, 2, 4, "max")  # rungs at 1 and 2
    for number, value in ((1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)):
        rungs.report(_trial(number, [value]))
    assert rungs.next_rung(4) == 2 and rungs.next_rung(5) == 1
    rungs.report(_trial(4, [0.4, 0.4]))
    assert rungs.next_rung(4) is None
    assert rungs.promote({1, 2, 3, 4}) == 3  # 4 is paused at rung 2, where it is alone
    rungs.report(_trial(3, [0.3, 0.3]))
    assert rungs.promote({1, 2, 3, 4}) == 4
    assert rungs.promote({1, 2, 3}) is None


def test_without_new_trials_one_trains_to_the_end() -> None:
    rungs = Rungs(1, 2, 16, "max")
    rungs.report(_trial(3, [0.1]))
    assert rungs.promote({3}) is None and rungs.promote_final({3}, {2}) is None  # 2 is on its way to the rung
    assert rungs.promote_final({3}, set()) == 3


def test_a_finished_trial_takes_no_place_at_its_last_rung() -> None:
    rungs = Rungs(2, 4, 24, "max")
    for number, value in ((1, 0.4), (2, 0.3), (3, 0.2), (4, 0.1)):
        rungs.report(_trial(number, [value] * 2))
    assert rungs.promote({1, 2, 3, 4}) == 1
    rungs.report(_trial(1, [0.4] * 4, "failed"))
    assert rungs.promote({2, 3, 4}) is None  # of three, none yet
    assert rungs.promote_final({2, 3, 4}, set()) == 2
    rungs.report(_trial(2, [0.3] * 2, "done"))  # training.epochs was 2 for it
    assert rungs.promote_final({3, 4}, set()) == 3


class _Memory:
    """A store and a search in one; a point is a number."""

    def __init__(self) -> None:
        self.records: dict[int, Trial] = {}

    def spec(self, number: int, values: Any) -> TrialSpec:
        return TrialSpec(f"trials/{number:04d}", values, 1)

    def read_point(self, number: int) -> Any:
        return {"at": number} if number in self.records else None

    def write_point(self, spec: TrialSpec) -> None:
        pass

    def write_trial(self, spec: TrialSpec, trial: Trial) -> None:
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
    queue = SearchQueue(memory, memory, rungs, trials, list(memory.records.values()))  # type: ignore[arg-type]
    running: list[tuple[int, int, int]] = []  # ends at, number, epochs then
    now = 0
    while True:
        spec: Any = None
        while len(running) < at_once and isinstance(spec := queue.next(), TrialSpec):
            before = memory.records[spec.number].epochs if spec.number in memory.records else 0
            until = min(spec.until or longest, fails[1] if spec.number == fails[0] else longest)
            assert until > before
            heapq.heappush(running, (now + until - before, spec.number, until))
        if not running:
            assert spec is None  # "wait" with nothing running would wait for ever
            return {trial.number: trial for trial in queue.trials()}
        now, number, epochs = heapq.heappop(running)
        status = "failed" if (number, epochs) == fails else "done" if epochs == longest else "paused"
        queue.stopped(_trial(number, list(values[number - 1, :epochs]), status))


@pytest.mark.parametrize("at_once", [1, 2, 8, 27])
@pytest.mark.parametrize("seed", range(8))
def test_at_the_end_the_best_of_every_rung_are_promoted_and_few_others(seed: int, at_once: int) -> None:
    """Random curves: at every rung at least the best 1 / factor of the trials were promoted."""
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
    # All 27 reported at the first rung, whose quota is 9; trials that were among the best only for a time add to it.
    assert 9 <= sum(epochs > 1 for epochs in trained) <= 18


def test_running_trials_report_before_the_last_promotion() -> None:
    values = np.arange(1, 5)[:, None] * np.ones(8)  # the worst reports first
    trials = _simulate(values, Rungs(1, 4, 8, "max"), 4, _Memory())
    assert [trials[number].epochs for number in (1, 2, 3, 4)] == [1, 1, 1, 8]


def test_if_the_best_trial_fails_the_next_one_completes() -> None:
    values = np.array([0.4, 0.3, 0.2, 0.1])[:, None] * np.ones(24)
    trials = _simulate(values, Rungs(2, 4, 24, "max"), 1, _Memory(), (1, 5))
    assert [trials[n].status for n in (1, 2, 3, 4)] == ["failed", "done", "paused", "paused"]


def test_a_restart_resumes_interrupted_trials_and_knows_their_values() -> None:
    """1 and 2 ran beyond the first rung when the sweep was killed: 3 and 4, paused there, are not promoted instead."""
    memory, rungs = _Memory(), Rungs(1, 2, 8, "max")
    for number, values, status in (
        (1, [0.9] * 2, "interrupted"),
        (2, [0.8] * 2, "interrupted"),
        (3, [0.1], "paused"),
        (4, [0.2], "paused"),
    ):
        memory.records[number] = _trial(number, values, status)
        rungs.report(memory.records[number])
    queue = SearchQueue(memory, memory, rungs, 4, list(memory.records.values()))  # type: ignore[arg-type]
    first = [queue.next(), queue.next()]
    assert [(spec.number, spec.until) for spec in first if isinstance(spec, TrialSpec)] == [(1, 4), (2, 4)]
    assert queue.next() == "wait"


def test_a_promotion_is_on_disk_before_the_trial_starts() -> None:
    """A sweep that is killed then resumes it."""
    memory, rungs = _Memory(), Rungs(1, 2, 8, "max")
    for number, value in ((1, 0.1), (2, 0.2)):
        memory.records[number] = _trial(number, [value])
        rungs.report(memory.records[number])
    queue = SearchQueue(memory, memory, rungs, 2, list(memory.records.values()))  # type: ignore[arg-type]
    spec = queue.next()
    assert isinstance(spec, TrialSpec) and spec.number == 2
    assert memory.records[2].status == "interrupted" and memory.records[2].epochs == 1
    assert queue.paused() == {1}


def test_finished_trials_leave_room_for_later_ones() -> None:
    """A larger tune.trials later: the four finished trials do not block the promotion of four new ones."""
    past = [_trial(1, [0.9] * 8, "done"), *(_trial(n, [1 - n / 10], "pruned") for n in (2, 3, 4))]
    space = _sweep()
    rungs = make_rungs(space, past)
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
    return check(config, [])
