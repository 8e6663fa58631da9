"""The median stopping rule, the budget, and what is kept of a running trial. The rule needs Ray only as its reference."""

from typing import Any

import numpy as np
import pytest

from recray.records import Trial, TrialEpoch
from recray.tuning.objective import Objective
from recray.tuning.stopping import Budget, MedianRule


def _past(number: int, values: list[float]) -> Trial:
    curve = [TrialEpoch(epoch=i + 1, value=v, loss=1.0, seconds=1.0, at=0.0) for i, v in enumerate(values)]
    return Trial(number=number, values={}, seed=1, status="done", best=max(values), epochs=len(values), curve=curve)


class _RayTrial:
    """As much of a trial and a controller as Ray Tune's rule looks at."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id

    def get_live_trials(self) -> list[Any]:
        return []


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("seed", range(5))
def test_median_rule_decides_as_ray_tune_does(seed: int, mode: Any) -> None:
    """Random walks of twelve trials, interleaved; a stopped trial reports no more."""
    schedulers = pytest.importorskip("ray.tune.schedulers")
    ray_rule = schedulers.MedianStoppingRule("epoch", "m", mode, grace_period=2, min_samples_required=3)
    rule = MedianRule(2, Objective("m", mode), [])
    rng = np.random.default_rng(seed)
    trials = [_RayTrial(str(n)) for n in range(12)]
    for trial in trials:
        ray_rule.on_trial_add(trial, trial)
    walks = rng.normal(size=(12, 12)).cumsum(1) + rng.normal(size=(12, 1))
    left, stopped = {n: 0 for n in range(12)}, 0
    while left:
        n = int(rng.choice(list(left)))
        left[n] += 1
        epoch, value = left[n], float(walks[n, left[n] - 1])
        expected = ray_rule.on_trial_result(trials[n], trials[n], {"epoch": epoch, "m": value}) == "STOP"
        assert rule.stops(str(n), epoch, value) is expected
        stopped += expected
        if expected or epoch == 12:
            del left[n]
    assert 0 < stopped < 12


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


def test_a_trial_that_fails_while_it_resumes_keeps_its_epochs() -> None:
    pytest.importorskip("ray.tune")
    from recray.tuning.runner import _Running
    from recray.tuning.store import TrialSpec

    before = _past(3, [0.1, 0.4, 0.2])
    running = _Running(TrialSpec("trials/0003", {}, 1), before, before.model_copy(update={"epochs": 0, "curve": []}))
    running.add({"epoch": 1, "m": 0.1, "loss": 1.0, "seconds": 1.0, "again": True}, Objective("m", "max"))
    running.add({"epoch": 1, "failed": "its process was killed"}, Objective("m", "max"))
    made = running.trial()
    assert (made.status, made.reason, made.best, made.epochs) == ("failed", "its process was killed", 0.4, 3)
    assert made.curve == before.curve


@pytest.mark.parametrize(
    ("report", "status"),
    [({}, "interrupted"), ({"done": True}, "pruned"), ({"ended": "paused"}, "paused"), ({"failed": "oom"}, "failed")],
)
def test_the_last_report_decides_the_status(report: dict[str, Any], status: str) -> None:
    pytest.importorskip("ray.tune")
    from recray.tuning.runner import _Running
    from recray.tuning.store import TrialSpec

    now = Trial(number=1, values={}, seed=1, status="interrupted")
    running = _Running(TrialSpec("trials/0001", {}, 1), None, now)
    for epoch in (1, 2, 2):  # with several workers the last epoch is reported twice
        result = {"epoch": epoch, "m": epoch / 10, "loss": 1.0, "seconds": 2.0, "validation_seconds": 1.0}
        running.add(result, Objective("m", "max"))
    running.add({**result, **report}, Objective("m", "max"))
    made = running.trial()
    assert (made.status, made.epochs, made.seconds, made.best) == (status, 2, 6.0, 0.2)
    assert [one.value for one in made.curve] == [0.1, 0.2]
