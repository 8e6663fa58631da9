"""What the runner keeps of a running trial, and the median rule against Ray Tune's. No Ray is started."""

from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import MedianStoppingRule

from recray.records import Trial, TrialEpoch
from recray.tuning.objective import Objective
from recray.tuning.runner import _Running
from recray.tuning.stopping import MedianRule
from recray.tuning.store import TrialSpec


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
    ray_rule = MedianStoppingRule("epoch", "m", mode, grace_period=2, min_samples_required=3)
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


def test_a_trial_that_fails_while_it_resumes_keeps_its_epochs() -> None:
    values = [0.1, 0.4, 0.2]
    curve = [TrialEpoch(epoch=i + 1, value=value, loss=1.0, seconds=1.0, at=0.0) for i, value in enumerate(values)]
    before = Trial(number=3, values={}, seed=1, status="interrupted", best=0.4, epochs=3, curve=curve)
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
    now = Trial(number=1, values={}, seed=1, status="interrupted")
    running = _Running(TrialSpec("trials/0001", {}, 1), None, now)
    for epoch in (1, 2, 2):  # with several workers the last epoch is reported twice
        result = {"epoch": epoch, "m": epoch / 10, "loss": 1.0, "seconds": 2.0, "validation_seconds": 1.0}
        running.add(result, Objective("m", "max"))
    running.add({**result, **report}, Objective("m", "max"))
    made = running.trial()
    assert (made.status, made.epochs, made.seconds, made.best) == (status, 2, 6.0, 0.2)
    assert [one.value for one in made.curve] == [0.1, 0.2]
