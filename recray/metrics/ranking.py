"""Metrics of ranked lists with binary gain. numpy only.

T is the set of a user's held-out items, R the first K of the ranking, r_i its i-th item.

    recall         |R n T| / |T|
    recall_capped  |R n T| / min(K, |T|)
    hr             1 when R and T meet
    ndcg           sum_i [r_i in T] / log2(i + 1)  over  sum_{i <= min(K, |T|)} 1 / log2(i + 1)
    mrr            1 / rank of the first hit, 0 past K
    map            sum_i precision@i [r_i in T] / |T|

Users with empty T have no value: leave them out before the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recray.ids import FIRST_ITEM, UNKNOWN

_TIMES = 1 << 22  # how often users are drawn, in memory at a time (32 MB)


@dataclass(frozen=True)
class ListMetric:
    """A metric of ranked lists.

    compute: (B, K) bool, whether the item at each place of a list is one of its query's targets, and (B,) numbers of
    targets, at least 1 -> (B,) values, whose mean over queries is reported.
    """

    compute: Callable[[np.ndarray, np.ndarray], np.ndarray]
    higher_is_better: bool = True


def hits(ranked_BK: np.ndarray, target_values: np.ndarray, target_offsets: np.ndarray) -> np.ndarray:
    """(B, K) bool: whether the item at each place is one of the user's targets.

    Padding and unknown items never hit. Repeated targets count once.
    """
    span = np.int64(max(ranked_BK.max(initial=0), target_values.max(initial=0)) + 1)
    row_B = np.arange(len(ranked_BK), dtype=np.int64)
    target = np.repeat(row_B, np.diff(target_offsets)) * span + target_values
    keys = row_B[:, None] * span + ranked_BK
    return _isin(keys, target) & (ranked_BK >= FIRST_ITEM)


def _isin(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """np.isin for few `wanted`, without sorting the keys."""
    if not len(wanted):
        return np.zeros(keys.shape, bool)
    ordered = np.sort(wanted)
    return np.asarray(ordered.take(np.searchsorted(ordered, keys), mode="clip") == keys)


def num_distinct(target_values: np.ndarray, target_offsets: np.ndarray) -> np.ndarray:
    """(B,) |T|: distinct known targets, and every unknown one by itself: each is a miss."""
    row = np.repeat(np.arange(len(target_offsets) - 1), np.diff(target_offsets))
    order = np.lexsort((target_values, row))
    r, v = row[order], target_values[order]
    new = np.ones(len(v), bool)
    new[1:] = (r[1:] != r[:-1]) | (v[1:] != v[:-1]) | (v[1:] == UNKNOWN)
    return np.bincount(r[new], minlength=len(target_offsets) - 1)


def shared(values: np.ndarray, offsets: np.ndarray, others: np.ndarray, other_offsets: np.ndarray) -> np.ndarray:
    """(T,) bool: whether each entry of a row's list is in the other list of that row, too."""
    span = np.int64(max(values.max(initial=0), others.max(initial=0)) + 1)
    row_B = np.arange(len(offsets) - 1, dtype=np.int64) * span
    keys, other_keys = (np.repeat(row_B, np.diff(at)) + v for v, at in ((values, offsets), (others, other_offsets)))
    return _isin(keys, other_keys)


def found(ranked_BK: np.ndarray, target_values: np.ndarray, target_offsets: np.ndarray) -> np.ndarray:
    """(T,) bool: whether each target is in its user's list. Unknown items are in none."""
    offsets = np.arange(len(ranked_BK) + 1) * ranked_BK.shape[1]
    return shared(target_values, target_offsets, ranked_BK.reshape(-1), offsets) & (target_values >= FIRST_ITEM)


def per_user(
    hits_BK: np.ndarray, num_targets_B: np.ndarray, ks: Sequence[int], metrics: Mapping[str, ListMetric] | None = None
) -> dict[str, np.ndarray]:
    """'name@k' -> (B,) float64, of these metrics; of all shipped ones if none are given."""
    out: dict[str, np.ndarray] = {}
    for k in ks:
        if k > hits_BK.shape[1]:
            raise ValueError(f"k = {k} is more than the {hits_BK.shape[1]} ranked items given")
        for name, metric in (METRICS if metrics is None else metrics).items():
            out[f"{name}@{k}"] = np.asarray(metric.compute(hits_BK[:, :k], num_targets_B), np.float64)
    return out


def _discount(k: int) -> np.ndarray:
    return np.asarray(1 / np.log2(np.arange(2, k + 2)))


def _recall(hit_BK: np.ndarray, num_B: np.ndarray) -> np.ndarray:
    return np.asarray(hit_BK.sum(axis=1) / num_B)


def _recall_capped(hit_BK: np.ndarray, num_B: np.ndarray) -> np.ndarray:
    return np.asarray(hit_BK.sum(axis=1) / np.minimum(num_B, hit_BK.shape[1]))


def _hr(hit_BK: np.ndarray, num_B: np.ndarray) -> np.ndarray:
    return np.asarray(hit_BK.any(axis=1).astype(np.float64))


def _ndcg(hit_BK: np.ndarray, num_B: np.ndarray) -> np.ndarray:
    # Running sums, not np.sum: its pairwise order of additions would give other last bits for another K.
    discount = _discount(hit_BK.shape[1])
    ideal = np.concatenate([[0.0], np.cumsum(discount)])
    gain_B = np.cumsum(hit_BK * discount, axis=1)[:, -1]
    return np.asarray(gain_B / ideal[np.minimum(num_B, hit_BK.shape[1])])


def _mrr(hit_BK: np.ndarray, num_B: np.ndarray) -> np.ndarray:
    return np.asarray(np.where(hit_BK.any(axis=1), 1 / (hit_BK.argmax(axis=1) + 1), 0.0))


def _map(hit_BK: np.ndarray, num_B: np.ndarray) -> np.ndarray:
    found_BK = np.cumsum(hit_BK.astype(np.float64), axis=1)
    precision_B = np.cumsum(hit_BK * found_BK / np.arange(1, hit_BK.shape[1] + 1), axis=1)[:, -1]
    return np.asarray(precision_B / num_B)


METRICS: dict[str, ListMetric] = {
    "recall": ListMetric(_recall),
    "recall_capped": ListMetric(_recall_capped),
    "hr": ListMetric(_hr),
    "ndcg": ListMetric(_ndcg),
    "mrr": ListMetric(_mrr),
    "map": ListMetric(_map),
}


def bootstrap(
    values_BM: np.ndarray, resamples: int, seed: int, user_B: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile interval of each column's mean over rows: (M,) low and (M,) high.

    user_B: the user of each row; users are resampled, since the rows of one are not independent. Each row is a user of its
    own if it is None. The same resampled users serve every column.
    """
    size_U = np.ones(len(values_BM))
    if user_B is not None:
        _, user_B = np.unique(user_B, return_inverse=True)
        size_U = np.bincount(user_B).astype(float)
        values_BM = np.stack([np.bincount(user_B, column) for column in values_BM.T], axis=1)
    return bootstrap_sums(values_BM, size_U, resamples, seed)


def bootstrap_sums(sum_UM: np.ndarray, size_U: np.ndarray, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The same from the sums of each user's rows and their numbers."""
    rng = np.random.default_rng(seed)
    n = len(sum_UM)
    both_UM = np.column_stack([sum_UM, size_U])
    means_RM = np.empty((resamples, sum_UM.shape[1]))
    at_once = max(1, min(resamples, _TIMES // max(n, 1)))
    for first in range(0, resamples, at_once):
        # A product with the sums for several resamples at once: they are read from memory once.
        means = means_RM[first : first + at_once]
        times_RU = np.empty((len(means), n))
        for times_U in times_RU:
            times_U[:] = np.bincount(rng.integers(0, n, n), minlength=n)
        sums_RM = times_RU @ both_UM
        np.divide(sums_RM[:, :-1], sums_RM[:, -1:], out=means)
    return np.quantile(means_RM, 0.025, axis=0), np.quantile(means_RM, 0.975, axis=0)
