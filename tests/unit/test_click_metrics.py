"""Click metrics against scikit-learn on the same scores."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss, roc_auc_score

from recray.metrics.clicks import BINS, METRICS, Clicks


def _scored(seed: int, n: int = 3000, users: int = 80) -> tuple[np.ndarray, ...]:
    """Scores with many ties, weights, users of very different sizes."""
    rng = np.random.default_rng(seed)
    user = np.minimum(rng.geometric(0.03, n), users) * 7
    logit = np.round(rng.normal(size=n), 1)
    label = (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(float)
    return user, logit, label, rng.random(n) * 3


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weighted", [False, True])
def test_equal_scikit_learn(seed: int, weighted: bool) -> None:
    user, logit, label, weight = _scored(seed)
    weight = weight if weighted else np.ones(len(user))
    found = Clicks(user, logit, label, weight).metrics()
    p = 1 / (1 + np.exp(-logit))
    assert found["auc"] == pytest.approx(roc_auc_score(label, logit, sample_weight=weight), abs=1e-12)
    assert found["log_loss"] == pytest.approx(log_loss(label, p, sample_weight=weight), abs=1e-12)
    share = np.average(label, weights=weight)
    always = log_loss(label, np.full(len(label), share), sample_weight=weight)
    assert found["normalized_entropy"] == pytest.approx(found["log_loss"] / always, abs=1e-12)
    aucs, sizes = [], []
    for one in np.unique(user):
        mine = user == one
        if 0 < label[mine].sum() < mine.sum():
            aucs.append(roc_auc_score(label[mine], logit[mine], sample_weight=weight[mine]))
            sizes.append(weight[mine].sum())
    assert found["gauc"] == pytest.approx(np.mean(aucs), abs=1e-12)
    assert found["gauc_impressions"] == pytest.approx(np.average(aucs, weights=sizes), abs=1e-12)


def test_calibration_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    logit = rng.normal(size=4000)
    label = (rng.random(4000) < 0.3).astype(float)
    clicks = Clicks(np.arange(4000), logit, label)
    observed, predicted = calibration_curve(label, 1 / (1 + np.exp(-logit)), n_bins=BINS, strategy="quantile")
    table = clicks.reliability()[::-1]
    assert [one.predicted for one in table] == pytest.approx(predicted.tolist(), abs=1e-12)
    assert [one.observed for one in table] == pytest.approx(observed.tolist(), abs=1e-12)
    assert clicks.metrics()["ece"] == pytest.approx(np.abs(observed - predicted).mean(), abs=1e-12)


def test_resampled_users_count_as_often_as_they_were_drawn() -> None:
    user, logit, label, weight = _scored(5, n=400, users=12)
    clicks = Clicks(user, logit, label, weight)
    keys = np.unique(user)
    times = np.random.default_rng(1).integers(0, 3, len(keys))
    repeated = np.repeat(np.arange(len(user)), times[np.searchsorted(keys, user)])
    found = clicks.metrics(times.astype(float))
    assert found["auc"] == pytest.approx(
        roc_auc_score(label[repeated], logit[repeated], sample_weight=weight[repeated])
    )
    assert found["log_loss"] == pytest.approx(
        log_loss(label[repeated], 1 / (1 + np.exp(-logit[repeated])), sample_weight=weight[repeated])
    )


def test_intervals_hold_the_value() -> None:
    clicks = Clicks(*_scored(2))
    values, bounds = clicks.metrics(), clicks.bootstrap(200, seed=1)
    for name in set(METRICS) - {"ece"}:  # ECE is a mean of absolute values: resampling adds to it
        low, high = bounds[name]
        assert low < values[name] < high


def test_one_label_only_has_no_auc() -> None:
    found = Clicks(np.zeros(3), np.array([1.0, 2.0, 3.0]), np.ones(3)).metrics()
    assert np.isnan(found["auc"]) and np.isnan(found["gauc"]) and found["log_loss"] > 0
