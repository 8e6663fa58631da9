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

from recray.ids import FIRST_ITEM
from recray.records import SweepPoint
from recray.retrieval import faiss_index
from recray.retrieval.exact import top_k

_EPSILON = 1e-5  # relative: rounding differs between two exact searches, which is no loss of recall


def sweep(
    index: Any, vectors_ND: np.ndarray, queries_QD: np.ndarray, k: int, target: float
) -> tuple[SweepPoint, float, list[SweepPoint]]:
    """The chosen point, its recall on the reporting half, and all points. The index is left with the chosen setting."""
    half = max(1, len(queries_QD) // 2)
    tune_QD, report_QD = queries_QD[:half], queries_QD[half:] if len(queries_QD) > 1 else queries_QD
    k = min(k, len(vectors_ND) - FIRST_ITEM)
    curve = []
    exact = exact_scores(tune_QD, vectors_ND, k)
    for setting in faiss_index.settings(index):
        faiss_index.apply(index, setting)
        recall, at_10, missing, milliseconds = measure(index, tune_QD, exact, k)
        curve.append(
            SweepPoint(
                setting=setting, recall=recall, recall_at_10=at_10, milliseconds=milliseconds, missing_share=missing
            )
        )
    good = [point for point in curve if point.recall >= target]
    chosen = min(good, key=lambda p: p.milliseconds) if good else max(curve, key=lambda p: p.recall)
    faiss_index.apply(index, chosen.setting)
    recall, *_ = measure(index, report_QD, exact_scores(report_QD, vectors_ND, k), k)
    return chosen, recall, curve


def exact_scores(queries_QD: np.ndarray, vectors_ND: np.ndarray, k: int) -> np.ndarray:
    """(Q, k) exact scores, best first."""
    _, scores = top_k(torch.from_numpy(queries_QD), torch.from_numpy(vectors_ND), k)
    return scores.numpy()


def measure(index: Any, queries_QD: np.ndarray, exact_QK: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """recall@k, recall@10, share of missing results, milliseconds per query.

    A result is correct if its score reaches the exact k-th score, so that ties do not count as misses.
    """
    started = time.perf_counter()
    scores, ids = index.search(np.ascontiguousarray(queries_QD, np.float32), k + FIRST_ITEM)
    milliseconds = (time.perf_counter() - started) * 1000 / len(queries_QD)

    def recall(at: int) -> float:
        bar = exact_QK[:, at - 1 : at] - _EPSILON * np.abs(exact_QK[:, at - 1 : at])
        right = ((scores >= bar) & (ids >= FIRST_ITEM)).sum(axis=1)
        return float(np.minimum(right, at).mean() / at)

    return recall(k), recall(min(10, k)), float((ids < 0).mean()), milliseconds
