"""The fastest index setting that reaches the recall target, measured with real query vectors.

One half of the queries selects the setting, the other half measures the recall that is reported. All settings are
measured instead of bisected, because with coarse codes recall is not monotone in nprobe. With the target 0.95:

    nprobe   1     2     4     8
    recall   0.71  0.90  0.96  0.99
    ms       0.02  0.03  0.05  0.09     -> nprobe 4
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from recray import progress
from recray.ids import FIRST_ITEM
from recray.records import SweepPoint
from recray.retrieval import faiss_index
from recray.retrieval.exact import top_k

# Of |query| |item|: fp32 products of an exact search are rounded, so that items of about equal score change places.
_ROUNDING = 2e-7


def sweep(
    index: Any, vectors_ND: np.ndarray, queries_QD: np.ndarray, k: int, target: float
) -> tuple[SweepPoint, float, list[SweepPoint]]:
    """The chosen point, its recall on the reporting half, and all points. The index is left with the chosen setting."""
    half = max(1, len(queries_QD) // 2)
    tune_QD, report_QD = queries_QD[:half], queries_QD[half:] if len(queries_QD) > 1 else queries_QD
    k = min(k, len(vectors_ND) - FIRST_ITEM)
    curve = []
    exact = exact_scores(tune_QD, vectors_ND, k)
    for setting in progress.track(faiss_index.settings(index), "index", "measure settings"):
        faiss_index.apply(index, setting)
        recall, at_10, missing, milliseconds = measure(index, vectors_ND, tune_QD, exact, k)
        curve.append(
            SweepPoint(
                setting=setting, recall=recall, recall_at_10=at_10, milliseconds=milliseconds, missing_share=missing
            )
        )
    good = [point for point in curve if point.recall >= target]
    chosen = min(good, key=lambda p: p.milliseconds) if good else max(curve, key=lambda p: p.recall)
    faiss_index.apply(index, chosen.setting)
    recall, *_ = measure(index, vectors_ND, report_QD, exact_scores(report_QD, vectors_ND, k), k)
    return chosen, recall, curve


def exact_scores(queries_QD: np.ndarray, vectors_ND: np.ndarray, k: int) -> np.ndarray:
    """(Q, k) exact scores in float64, best first, less what fp32 rounds."""
    ids = top_k(torch.from_numpy(queries_QD), torch.from_numpy(vectors_ND), k)[0].numpy()
    lengths_QK = np.stack([np.linalg.norm(vectors_ND[row], axis=1) for row in ids])
    lengths_QK *= np.linalg.norm(queries_QD, axis=1)[:, None]
    return -np.sort(_ROUNDING * lengths_QK - _scores(queries_QD, vectors_ND, ids), axis=1)


def measure(
    index: Any, vectors_ND: np.ndarray, queries_QD: np.ndarray, exact_QK: np.ndarray, k: int
) -> tuple[float, float, float, float]:
    """recall@k, recall@10, share of missing results, milliseconds per query.

    The first k items that the index returns are scored exactly: its own scores are those of codes, or of normalised
    vectors. An item is correct if its exact score reaches the exact k-th best, so that ties do not count as misses.
    """
    started = time.perf_counter()
    _, ids = index.search(np.ascontiguousarray(queries_QD, np.float32), k + FIRST_ITEM)
    milliseconds = (time.perf_counter() - started) * 1000 / len(queries_QD)
    # A stable sort moves the reserved and missing ids to the right.
    order = np.argsort(ids < FIRST_ITEM, axis=1, kind="stable")[:, :k]
    found_QK = np.take_along_axis(ids, order, 1)
    scores_QK = np.where(found_QK < FIRST_ITEM, -np.inf, _scores(queries_QD, vectors_ND, found_QK))

    def recall(at: int) -> float:
        return float((scores_QK[:, :at] >= exact_QK[:, at - 1 : at]).mean())

    return recall(k), recall(min(10, k)), float((ids < 0).mean()), milliseconds


def _scores(queries_QD: np.ndarray, vectors_ND: np.ndarray, ids_QK: np.ndarray) -> np.ndarray:
    """(Q, K) inner products in float64 of every query with its items; a missing id counts as item 0."""
    rows = zip(queries_QD, np.maximum(ids_QK, 0), strict=True)
    return np.stack([vectors_ND[ids].astype(np.float64) @ query.astype(np.float64) for query, ids in rows])
