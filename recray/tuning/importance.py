"""How much of a sweep's outcome each key explains alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from recray.records import Trial

_BINS = 4
_FEWEST = 8  # trials with a key below which nothing is said of it


def importance(trials: list[Trial]) -> dict[str, float]:
    """Key -> epsilon^2 in [0, 1], largest first: the share of the variance of the trials' ranks between values of the key.

        epsilon^2 = (SS_between - (g - 1) MS_within) / SS_total            (Kelley 1935)

    over g groups of trials: a choice each, or quarters (halves, of few trials) of the values drawn from a range. Unlike eta^2 it expects 0
    of a key that does nothing. Ranks, as one diverged trial would else be all the variance. A trial without the key is
    left out for it. Interactions between keys are not seen.
    """
    known = [trial for trial in trials if trial.best is not None]
    found: dict[str, float] = {}
    for key in {key: None for trial in known for key in trial.values}:
        having = [trial for trial in known if key in trial.values]
        if len(having) < _FEWEST:
            continue
        ranks = np.argsort(np.argsort([trial.best or 0.0 for trial in having])).astype(float)
        groups = _groups([trial.values[key] for trial in having])
        parts = [ranks[groups == group] for group in np.unique(groups)]
        total = float(((ranks - ranks.mean()) ** 2).sum())
        within = float(sum(((part - part.mean()) ** 2).sum() for part in parts))
        free = len(ranks) - len(parts)
        if len(parts) < 2 or not free:
            found[key] = 0.0
            continue
        found[key] = max(0.0, (total - within - (len(parts) - 1) * within / free) / total)
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def _groups(values: list[Any]) -> np.ndarray:
    """A group's number for every value."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    distinct = sorted({repr(value) for value in values})
    bins = max(2, min(_BINS, len(values) // 4))
    if not numbers or len(distinct) <= _BINS:
        return np.array([distinct.index(repr(value)) for value in values])
    edges = np.quantile(values, np.arange(1, bins) / bins)
    return np.searchsorted(edges, values, side="left")
