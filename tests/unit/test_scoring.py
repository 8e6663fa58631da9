"""Exact search against a sort of all scores: order, ties, exclusions, rows that fall short."""

import numpy as np
import pytest
import torch

from recray.ids import FIRST_ITEM
from recray.loading.batch import Jagged
from recray.retrieval import exact
from recray.retrieval.exact import best_of, top_k


def _by_sort(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(scores, order, 1)
    return np.where(best == -np.inf, 0, order), best


@pytest.mark.parametrize("columns", [7, 40, 1000, 5003])
@pytest.mark.parametrize("values", [2, 30, 10**6])
@pytest.mark.parametrize("k", [1, 10, 31])
@pytest.mark.parametrize("head", [4, 4096])
def test_the_best_and_the_lowest_of_equals(
    columns: int, values: int, k: int, head: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "_HEAD", head)
    rng = np.random.default_rng([columns, values, k])
    scores = rng.integers(0, values, (6, columns)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.2] = -np.inf
    scores[4, 3:] = scores[5] = -np.inf
    found, best = best_of(torch.from_numpy(scores), k)
    expected, wanted = _by_sort(scores, k)
    width = min(k, columns)
    assert (found.numpy()[:, :width] == expected).all() and (best.numpy()[:, :width] == wanted).all()
    assert not found[:, width:].any() and (best[:, width:] == -torch.inf).all()


def test_seen_items_never_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "_SCORES", 4000)  # two queries at a time
    rng = np.random.default_rng(0)
    # Whole numbers: every order of adding gives the same score.
    q, v = (rng.integers(-3, 4, shape).astype(np.float32) for shape in ((5, 8), (2000, 8)))
    seen = [rng.integers(0, 2000, n) for n in (0, 3, 700, 1, 40)]
    offsets = np.cumsum([0, *map(len, seen)])
    exclude = Jagged(torch.from_numpy(np.concatenate(seen)), torch.from_numpy(offsets))
    ids, scores = top_k(torch.from_numpy(q), torch.from_numpy(v), 20, exclude)
    every = q @ v.T
    every[:, :FIRST_ITEM] = -np.inf
    for row, items in enumerate(seen):
        every[row, items] = -np.inf
    expected, best = _by_sort(every, 20)
    assert (ids.numpy() == expected).all() and (scores.numpy() == best).all()
