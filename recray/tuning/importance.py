"""How much of a sweep's outcome each key explains alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from recray.records import Trial

_BINS = 4
_MIN_TRIALS = 8  # with fewer trials that have a key, its importance is not reported


def importance(trials: list[Trial]) -> dict[str, float]:
    """Key -> epsilon^2 in [0, 1], largest first: the share of the variance of the trials' ranks between values of the key.

        epsilon^2 = (SS_between - (g - 1) MS_within) / SS_total            (Kelley 1935)

    over g groups of trials: one per choice, or quantile bins of the values drawn from a range (quarters, or halves when
    there are few trials). Unlike eta^2 its expectation is 0 for a key that has no effect. Ranks are used because a
    single diverged trial would otherwise make up most of the variance; equal values share their mean rank. Trials
    without the key are left out. Interactions between keys are not measured.

    A key of which nothing can be said is left out; `unmeasured` says why.
    """
    found: dict[str, float] = {}
    for key, having in _by_key(trials).items():
        if _why_not(key, having):
            continue
        ranks = _ranks(having)
        groups = _groups([trial.values[key] for trial in having])
        parts = [ranks[groups == group] for group in np.unique(groups)]
        total = float(((ranks - ranks.mean()) ** 2).sum())
        within = float(sum(((part - part.mean()) ** 2).sum() for part in parts))
        free = len(ranks) - len(parts)
        found[key] = max(0.0, (total - within - (len(parts) - 1) * within / free) / total)
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def unmeasured(trials: list[Trial]) -> dict[str, str]:
    """Key -> why its importance is unknown, of the keys that `importance` leaves out."""
    return {key: why for key, having in _by_key(trials).items() if (why := _why_not(key, having))}


def _by_key(trials: list[Trial]) -> dict[str, list[Trial]]:
    """The trials that have a result and the key, of every key."""
    keys = {key: None for trial in trials for key in trial.values}
    return {key: [trial for trial in trials if trial.best is not None and key in trial.values] for key in keys}


def _why_not(key: str, having: list[Trial]) -> str:
    """Why the importance of a key cannot be measured; empty if it can."""
    if len({repr(trial.values[key]) for trial in having}) == 1:
        return "not varied"
    if len(having) < _MIN_TRIALS:
        return "too few trials"
    if len({trial.best for trial in having}) == 1:
        return "all results are equal"
    groups = len(np.unique(_groups([trial.values[key] for trial in having])))
    return "too few trials for its values" if groups == len(having) else ""


def _ranks(trials: list[Trial]) -> np.ndarray:
    """Ranks of the trials' values, from 0; equal values have their mean rank."""
    _, place, count = np.unique([trial.best or 0.0 for trial in trials], return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[place]


def _groups(values: list[Any]) -> np.ndarray:
    """The group number of every value."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    distinct = sorted({repr(value) for value in values})
    bins = max(2, min(_BINS, len(values) // 4))
    if not numbers or len(distinct) <= _BINS:
        return np.array([distinct.index(repr(value)) for value in values])
    edges = np.quantile(values, np.arange(1, bins) / bins)
    return np.searchsorted(edges, values, side="left")
