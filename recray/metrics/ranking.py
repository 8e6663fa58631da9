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

from collections.abc import Sequence

import numpy as np

from recray.ids import FIRST_ITEM, UNKNOWN

NAMES = ("recall", "recall_capped", "hr", "ndcg", "mrr", "map")


def hits(ranked_BK: np.ndarray, target_values: np.ndarray, target_offsets: np.ndarray) -> np.ndarray:
    """(B, K) bool: whether the item at each place is one of the user's targets.

    Padding and unknown items never hit. Repeated targets count once.
    """
    span = np.int64(max(ranked_BK.max(initial=0), target_values.max(initial=0)) + 1)
    row_B = np.arange(len(ranked_BK), dtype=np.int64)
    target = np.repeat(row_B, np.diff(target_offsets)) * span + target_values
    keys = row_B[:, None] * span + ranked_BK
    return np.asarray(np.isin(keys, target) & (ranked_BK >= FIRST_ITEM))


def num_distinct(target_values: np.ndarray, target_offsets: np.ndarray) -> np.ndarray:
    """(B,) |T|: distinct known targets, and every unknown one by itself: each is a miss."""
    row = np.repeat(np.arange(len(target_offsets) - 1), np.diff(target_offsets))
    order = np.lexsort((target_values, row))
    r, v = row[order], target_values[order]
    new = np.ones(len(v), bool)
    new[1:] = (r[1:] != r[:-1]) | (v[1:] != v[:-1]) | (v[1:] == UNKNOWN)
    return np.bincount(r[new], minlength=len(target_offsets) - 1)


def per_user(
    hits_BK: np.ndarray, num_targets_B: np.ndarray, ks: Sequence[int], names: Sequence[str] = NAMES
) -> dict[str, np.ndarray]:
    """'name@k' -> (B,) float64."""
    width = hits_BK.shape[1]
    hit = hits_BK.astype(np.float64)
    discount = 1 / np.log2(np.arange(2, width + 2))
    found = np.cumsum(hit, axis=1)
    gain = np.cumsum(hit * discount, axis=1)
    precision = np.cumsum(hit * found / np.arange(1, width + 1), axis=1)
    ideal = np.concatenate([[0.0], np.cumsum(discount)])
    first = np.where(hits_BK.any(axis=1), hits_BK.argmax(axis=1) + 1, width + 1)
    out: dict[str, np.ndarray] = {}
    for k in ks:
        if k > width:
            raise ValueError(f"k = {k} is more than the {width} ranked items given")
        capped = np.minimum(num_targets_B, k)
        values = {
            "recall": found[:, k - 1] / num_targets_B,
            "recall_capped": found[:, k - 1] / capped,
            "hr": (found[:, k - 1] > 0).astype(np.float64),
            "ndcg": gain[:, k - 1] / ideal[capped],
            "mrr": np.where(first <= k, 1 / first, 0.0),
            "map": precision[:, k - 1] / num_targets_B,
        }
        out |= {f"{name}@{k}": values[name] for name in names}
    return out


def bootstrap(values_BM: np.ndarray, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile interval of each column's mean over rows: (M,) low and (M,) high.

    The same resampled rows serve every column.
    """
    rng = np.random.default_rng(seed)
    n = len(values_BM)
    means_RM = np.empty((resamples, values_BM.shape[1]))
    for r in range(resamples):
        means_RM[r] = np.bincount(rng.integers(0, n, n), minlength=n) @ values_BM / n
    return np.quantile(means_RM, 0.025, axis=0), np.quantile(means_RM, 0.975, axis=0)
