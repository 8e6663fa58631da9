"""Metrics of click prediction. numpy only.

    auc                  P(score of a click > score of a non-click), ties count one half
    gauc                 mean over users of their own AUC; users without both labels have none
    gauc_impressions     the same, users weighted by their impressions (Zhu et al., KDD 2017; DIN)
    log_loss             mean of -log P(label), natural logarithm
    normalized_entropy   log loss over that of always predicting the mean label (He et al., ADKDD 2014)
    ece                  expected calibration error: mean over BINS bins of equal size by score of
                         |mean prediction - mean label|, weighted by size (Naeini et al., AAAI 2015)

Intervals resample users, not impressions: a user's impressions are not independent.

Shape legend: I impressions, U users.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

BINS = 20


@dataclass(frozen=True)
class Bin:
    """One line of the reliability table."""

    predicted: float  # mean probability
    observed: float  # share of clicks
    impressions: int


@dataclass(frozen=True)
class ClickMetric:
    """A metric of scored impressions, one value for all of them.

    needs_probabilities: False if any score will do, so that baselines have the metric too.
    """

    compute: Callable[[Sample], float]
    higher_is_better: bool = True
    needs_probabilities: bool = True


class Clicks:
    """Scored impressions (I,) in order of their scores: logit, label (bool), weight, probability, user (0 to num_users)."""

    def __init__(
        self, user_I: np.ndarray, logit_I: np.ndarray, label_I: np.ndarray, weight_I: np.ndarray | None = None
    ) -> None:
        """logit_I: any real score; metrics that need probabilities read it as log p / (1 - p)."""
        order = np.argsort(logit_I, kind="stable")
        self.logit, self.label = logit_I[order].astype(np.float64), label_I[order] > 0
        self.weight = np.ones(len(order)) if weight_I is None else weight_I[order].astype(np.float64)
        _, self.user = np.unique(user_I[order], return_inverse=True)
        self.num_users = int(self.user.max(initial=-1)) + 1
        # Impressions of one score: first of each group, in order of scores.
        self._ties = np.flatnonzero(np.diff(self.logit, prepend=-np.inf) != 0)
        self.probability = 1 / (1 + np.exp(-np.clip(self.logit, -700, 700)))
        self.loss = np.logaddexp(0, np.where(self.label, -self.logit, self.logit))
        self.auc_U, self.size_U = self._user_aucs()

    def metrics(
        self, times_U: np.ndarray | None = None, metrics: Mapping[str, ClickMetric] | None = None
    ) -> dict[str, float]:
        """Name -> value, of all shipped metrics if none are given. times_U: how often each user counts, once if None.

        NaN where a metric needs clicks and non-clicks and one of them is missing.
        """
        sample = Sample(self, np.ones(self.num_users) if times_U is None else times_U)
        return {name: metric.compute(sample) for name, metric in (METRICS if metrics is None else metrics).items()}

    def reliability(self) -> list[Bin]:
        """Bins of about equal size by falling probability."""
        count = np.bincount(self._bin_of(self.weight), minlength=BINS)
        rows = zip(*self.bins(self.weight), count.tolist(), strict=True)
        return [Bin(float(p), float(o), n) for p, o, _, n in rows if n][::-1]

    def bootstrap(
        self, resamples: int, seed: int, metrics: Mapping[str, ClickMetric] | None = None
    ) -> dict[str, tuple[float, float]]:
        """95 % percentile interval of every metric over resampled users."""
        drawn = self.resampled(resamples, seed, metrics)
        return {name: interval(values_R) for name, values_R in drawn.items()}

    def resampled(
        self, resamples: int, seed: int, metrics: Mapping[str, ClickMetric] | None = None
    ) -> dict[str, np.ndarray]:
        """(R,) values of every metric, each over another draw of the users.

        Scores of the same impressions with the same seed have the same draws, so that their differences are paired.
        """
        rng = np.random.default_rng(seed)
        n = self.num_users
        drawn = [
            self.metrics(np.bincount(rng.integers(0, n, n), minlength=n).astype(float), metrics)
            for _ in range(resamples)
        ]
        return {name: np.array([one[name] for one in drawn]) for name in drawn[0]}

    def auc(self, weight: np.ndarray) -> float:
        positive, negative = weight * self.label, weight * ~self.label
        below = np.concatenate([[0.0], np.cumsum(negative)])
        ends = np.append(self._ties[1:], len(weight))
        pos_of_tie = np.add.reduceat(positive, self._ties) if len(self._ties) else np.zeros(0)
        wins = pos_of_tie @ (below[self._ties] + below[ends]) / 2
        pairs = positive.sum() * negative.sum()
        return float(wins / pairs) if pairs else float("nan")

    def _user_aucs(self) -> tuple[np.ndarray, np.ndarray]:
        """(U,) AUC of each user, NaN without both labels, and summed weight of impressions.

        Impressions of a user count by their weights, as in `auc`.
        """
        order = np.argsort(self.user, kind="stable")  # by user, then by score
        user, logit, label, weight = self.user[order], self.logit[order], self.label[order], self.weight[order]
        new = np.ones(len(user), bool)
        new[1:] = (user[1:] != user[:-1]) | (logit[1:] != logit[:-1])
        starts = np.flatnonzero(new)
        ends = np.append(starts[1:], len(user))
        below = np.concatenate([[0.0], np.cumsum(weight * ~label)])
        first = np.searchsorted(user, user[starts], side="left")
        middle = (below[starts] + below[ends]) / 2 - below[first]
        positive = np.add.reduceat(weight * label, starts) if len(starts) else np.zeros(0)
        size = np.bincount(user, weight, minlength=self.num_users)
        wins = np.bincount(user[starts], positive * middle, minlength=self.num_users)
        positives = np.bincount(user, weight * label, minlength=self.num_users)
        pairs = positives * (size - positives)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.where(pairs > 0, wins / pairs, np.nan)), size

    def _bin_of(self, weight: np.ndarray) -> np.ndarray:
        before = np.cumsum(weight) - weight / 2
        return np.asarray(np.minimum((before / max(weight.sum(), 1e-300) * BINS).astype(np.int64), BINS - 1))

    def bins(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(BINS,) mean probability, share of clicks, and weight."""
        bins = self._bin_of(weight)
        size = np.bincount(bins, weight, minlength=BINS)
        safe = np.maximum(size, 1e-300)
        mean = np.bincount(bins, weight * self.probability, minlength=BINS) / safe
        return mean, np.bincount(bins, weight * self.label, minlength=BINS) / safe, size


class Sample:
    """What a metric reads: impressions with weights, in which user u counts times_U[u] times.

    weight (I,), total: their sum, share: weighted share of clicks, NaN of nothing.
    """

    def __init__(self, clicks: Clicks, times_U: np.ndarray) -> None:
        self.clicks, self.times_U = clicks, times_U
        self.weight = clicks.weight * times_U[clicks.user]
        self.total = self.weight.sum()
        self.share = float(self.weight[clicks.label].sum() / self.total) if self.total else np.nan

    @cached_property
    def log_loss(self) -> float:
        return float(self.weight @ self.clicks.loss / self.total) if self.total else np.nan


def _gauc(sample: Sample, weight_U: np.ndarray) -> float:
    """Mean of the users' own AUC."""
    has = np.isfinite(sample.clicks.auc_U) & (sample.times_U > 0)
    return _average(sample.clicks.auc_U[has], weight_U[has])


def _normalized_entropy(sample: Sample) -> float:
    share = sample.share
    entropy = -(share * np.log(share) + (1 - share) * np.log1p(-share)) if 0 < share < 1 else np.nan
    return sample.log_loss / entropy


def _ece(sample: Sample) -> float:
    mean, observed, size = sample.clicks.bins(sample.weight)
    return float(size @ np.abs(mean - observed) / sample.total) if sample.total else np.nan


METRICS: dict[str, ClickMetric] = {
    "auc": ClickMetric(lambda sample: sample.clicks.auc(sample.weight), needs_probabilities=False),
    "gauc": ClickMetric(lambda sample: _gauc(sample, sample.times_U), needs_probabilities=False),
    "gauc_impressions": ClickMetric(
        lambda sample: _gauc(sample, sample.times_U * sample.clicks.size_U), needs_probabilities=False
    ),
    "log_loss": ClickMetric(lambda sample: sample.log_loss, higher_is_better=False),
    "normalized_entropy": ClickMetric(_normalized_entropy, higher_is_better=False),
    "ece": ClickMetric(_ece, higher_is_better=False),
}


def _average(values: np.ndarray, weights: np.ndarray) -> float:
    return float(values @ weights / weights.sum()) if weights.sum() > 0 else float("nan")


def interval(values_R: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of values, of those that are finite; NaN if none is."""
    good = values_R[np.isfinite(values_R)]
    if not len(good):
        return float("nan"), float("nan")
    return float(np.quantile(good, 0.025)), float(np.quantile(good, 0.975))
