"""Which index setting is chosen: the cheapest that reaches the recall target, or the best when none does."""

import numpy as np
import pytest

from recray.retrieval import faiss_index
from recray.retrieval.recall_sweep import sweep

pytest.importorskip("faiss")
K, DIM = 10, 8


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1002, DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(200, DIM)).astype(np.float32)


def _true_recall(index: object, vectors: np.ndarray, queries: np.ndarray) -> float:
    """Recall@K of items 2.. by comparing sets of ids with an exact search in float64."""
    exact = np.argsort(-(queries.astype(np.float64) @ vectors[2:].astype(np.float64).T), axis=1)[:, :K] + 2
    _, found = index.search(queries, K + 2)  # type: ignore[attr-defined]
    hits = [len(set(e) & set([i for i in f if i >= 2][:K])) for e, f in zip(exact, found.tolist(), strict=True)]
    return float(np.mean(hits)) / K


def test_a_target_that_is_reached_takes_the_cheapest_setting(vectors: np.ndarray, queries: np.ndarray) -> None:
    index, _ = faiss_index.build(vectors, "IVF16,Flat", "never")
    chosen, recall, curve = sweep(index, vectors, queries, K, 0.8)
    assert [point.setting for point in curve] == [{"nprobe": n} for n in (1, 2, 4, 8, 16)]
    assert curve[-1].recall == 1.0  # every list is probed: exact
    good = [point for point in curve if point.recall >= 0.8]
    assert chosen == min(good, key=lambda point: point.milliseconds)
    # The index is left at the chosen setting, and the recall is that of the other half of the queries.
    assert recall == pytest.approx(_true_recall(index, vectors, queries[100:]), abs=1e-9)


def test_a_target_that_is_not_reached_takes_the_best_setting(vectors: np.ndarray, queries: np.ndarray) -> None:
    index, _ = faiss_index.build(vectors, "IVF16,PQ2x4", "never")
    chosen, recall, curve = sweep(index, vectors, queries, K, 0.99)
    assert max(point.recall for point in curve) < 0.99 and recall < 0.99
    assert chosen.recall == max(point.recall for point in curve)
