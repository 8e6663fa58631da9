"""The budget, and the median stopping rule over restarts (tests/ray/test_tune_runner.py compares it with Ray Tune's)."""

from typing import Any

import pytest

from recray.records import Trial, TrialEpoch
from recray.tuning.objective import Objective
from recray.tuning.stopping import Budget, MedianRule


def _past(number: int, values: list[float]) -> Trial:
    curve = [TrialEpoch(epoch=i + 1, value=v, loss=1.0, seconds=1.0, at=0.0) for i, v in enumerate(values)]
    return Trial(number=number, values={}, seed=1, status="done", best=max(values), epochs=len(values), curve=curve)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_median_rule_compares_with_trials_of_earlier_starts(mode: Any) -> None:
    sign = 1.0 if mode == "max" else -1.0
    past = [_past(n, [sign * (0.1 * n + 0.01 * epoch) for epoch in range(20)]) for n in range(1, 5)]
    for value, stops in ((0.05, True), (0.9, False)):
        assert MedianRule(1, Objective("m", mode), past).stops("9", 1, sign * value) is stops


def test_median_rule_decides_once_about_an_epoch() -> None:
    """A resumed trial reports its earlier epochs again; it was not stopped then and is not stopped now."""
    rule = MedianRule(1, Objective("m", "max"), [_past(n, [0.5] * 20) for n in range(1, 5)])
    for epoch in range(1, 6):
        rule.add("9", epoch, 0.1)
    assert rule.stops("9", 6, 0.1)


def test_a_budget_counts_epochs_once() -> None:
    """Epochs of earlier starts count, and the ones that a resumed trial reports again do not count twice."""
    budget = Budget(None, 7, {1: 2})
    for trial, epoch in ((2, 1), (2, 2), (3, 1), (3, 1), (2, 1), (2, 2), (1, 1), (1, 2), (1, 3)):
        budget.count(trial, epoch)
        assert not budget.used_up()
    budget.count(2, 3)
    assert budget.used_up()
    assert Budget(0.0, None, {}).used_up()
