"""Schedulers and budgets of a sweep, without a cluster."""

from typing import Any

import pytest

pytest.importorskip("ray.tune")

from recray.config import Config, parse_config
from recray.records import Trial, TrialEpoch
from recray.tuning.check import check
from recray.tuning.runner import Budget, _State, make_scheduler
from recray.tuning.store import Job


class _Running:
    def __init__(self, number: int) -> None:
        self.trial_id = str(number)

    def get_live_trials(self) -> list[Any]:
        return []


def _config(scheduler: str) -> Config:
    tune = {"scheduler": scheduler, "space": {"model.dim": {"choices": [8, 16]}}}
    return parse_config({"data": {"source": "simulated"}, "tune": tune, "training": {"epochs": 20}})


def _scheduler(config: Config, mode: str, past: list[Trial]) -> Any:
    return make_scheduler(config, check(config, []), "ndcg@10", mode, past)


def _past(number: int, values: list[float]) -> Trial:
    curve = [TrialEpoch(epoch=i + 1, value=v, loss=1.0, seconds=1.0, at=0.0) for i, v in enumerate(values)]
    return Trial(number=number, values={}, seed=1, status="done", best=max(values), epochs=len(values), curve=curve)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_scheduler_knows_trials_of_earlier_starts(mode: str) -> None:
    config = _config("median")
    sign = 1.0 if mode == "max" else -1.0
    past = [_past(n, [sign * (0.1 * n + 0.01 * epoch) for epoch in range(20)]) for n in range(1, 5)]
    for value, stops in ((0.05, True), (0.9, False)):
        scheduler = _scheduler(config, mode, past)
        trial = _Running(9)
        scheduler.on_trial_add(trial, trial)
        first = {"epoch": 1, "ndcg@10": sign * value}
        assert (scheduler.on_trial_result(trial, trial, first) == "STOP") is stops


def test_what_was_reported_before_an_interruption_is_not_judged_again() -> None:
    config = _config("median")
    past = [_past(n, [0.5] * 20) for n in range(1, 5)]
    scheduler = _scheduler(config, "max", past)
    trial = _Running(9)
    scheduler.on_trial_add(trial, trial)
    for epoch in range(1, 6):
        assert scheduler.on_trial_result(trial, trial, {"epoch": epoch, "ndcg@10": 0.1, "again": True}) == "CONTINUE"
    later = ({"epoch": epoch, "ndcg@10": 0.1} for epoch in range(6, 20))
    assert any(scheduler.on_trial_result(trial, trial, one) == "STOP" for one in later)


def test_a_budget_counts_epochs_once() -> None:
    """Those of earlier starts, and those that a trial reports again when it goes on, too."""
    budget = Budget(None, 7, {1: 2})
    for trial, epoch in ((2, 1), (2, 2), (3, 1), (3, 1), (2, 1), (2, 2), (1, 1), (1, 2), (1, 3)):
        budget.count(trial, epoch)
        assert not budget.stop_all()
    budget.count(2, 3)
    assert budget.stop_all()
    assert Budget(0.0, None, {}).stop_all()


def test_what_a_trial_had_reached_is_not_lost_where_it_fails_as_it_goes_on() -> None:
    before = _past(3, [0.1, 0.4, 0.2])
    state = _State(Job("trials/0003", {}, 1), before)
    state.reason = "its process was killed"
    made = state.trial("failed", "max")
    assert (made.status, made.reason, made.best, made.epochs) == ("failed", "its process was killed", 0.4, 3)
    assert made.curve == before.curve
