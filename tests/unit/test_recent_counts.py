"""Counts as of each query's time, against plain loops over all events."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recray.config.baselines import RecentCountsOptions
from recray.ids import FIRST_ITEM, PAD
from recray.loading.batch import Batch
from recray.loading.collate import EvalQuery
from recray.loading.jagged import Jagged
from recray.retrieval.events import Steps
from recray.retrieval.recent_counts import RecentCounts

S = 1_000_000
N = 9
OPTIONS = RecentCountsOptions(window="40s", popularity_window="15s", last_items=2, smoothing=3)


def _query(time_B: list[int], seen: list[list[int]]) -> EvalQuery:
    ragged = Jagged(
        torch.tensor([item for one in seen for item in one], dtype=torch.int64),
        torch.tensor(np.concatenate([[0], np.cumsum([len(one) for one in seen])]), dtype=torch.int64),
    )
    zeros = torch.zeros(len(seen) + 1, dtype=torch.int64)
    batch = Batch(user_B=zeros[1:], history=ragged, target_Q=zeros[1:], weight_Q=zeros[1:].float())
    return EvalQuery(batch, ragged, Jagged(zeros[:0], zeros), torch.tensor(time_B))


def _events(seed: int, size: int = 300) -> Steps:
    rng = np.random.default_rng(seed)
    return Steps(rng.integers(0, 120, size) * S, rng.integers(1, N, size), rng.integers(0, N, size))


def _definition(events: Steps, options: RecentCountsOptions, now: int, seen: list[int], item: int) -> float:
    """P by the formula, one event after another."""
    window, popular = (int(one[:-1]) * S for one in (options.window, options.popularity_window))
    rows = [(int(t), int(i), int(p)) for t, i, p in zip(*events, strict=True) if i >= FIRST_ITEM]
    recent = [i for t, i, _ in rows if now - popular <= t < now]
    share = (recent.count(item) + 1e-6) / (len(recent) + 1)
    found, weights = 0.0, [0.5**back for back in range(options.last_items)]
    for back, weight in enumerate(weights, 1):
        last = seen[-back] if back <= len(seen) else PAD
        after = [i for t, i, p in rows if now - window <= t < now and p == last >= FIRST_ITEM and p != i]
        found += weight * (after.count(item) + options.smoothing * share) / (len(after) + options.smoothing)
    return found / sum(weights)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_probability_is_its_definition(seed: int) -> None:
    events, rng = _events(seed), np.random.default_rng(100 + seed)
    seen = [rng.integers(1, N + 3, rng.integers(0, 4)).tolist() for _ in range(20)]  # some ids never occur
    times = [*(rng.integers(-5, 130, 15) * S).tolist(), *events.time[:5].tolist()]
    query = _query(times, seen)
    rows, items = np.repeat(np.arange(20), N + 1), np.tile(np.arange(FIRST_ITEM, N + 3), 20)
    found = RecentCounts(OPTIONS, events).probabilities(query, rows, items)
    wanted = [_definition(events, OPTIONS, times[r], seen[r], int(i)) for r, i in zip(rows, items, strict=True)]
    assert np.allclose(found, wanted, rtol=1e-12)


def test_an_event_counts_from_the_second_after_it() -> None:
    """Moved onto the query's time, or behind it, an event changes nothing; a second earlier it counts."""
    quiet = Steps(np.array([10, 11]) * S, np.array([2, 3]), np.array([PAD, 2]))
    query, rows, items = _query([20 * S], [[2]]), np.zeros(3, np.int64), np.array([2, 3, 4])

    def found(at: int) -> list[float]:
        moved = Steps(*(np.append(x, y) for x, y in zip(quiet, (at, 4, 2), strict=True)))
        return RecentCounts(OPTIONS, moved).probabilities(query, rows, items).tolist()

    without = RecentCounts(OPTIONS, quiet).probabilities(query, rows, items).tolist()
    assert found(20 * S) == without == found(21 * S)
    assert found(19 * S)[2] > 1_000 * without[2] > 0
    assert found(20 * S - 1) == found(19 * S)


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_lists_are_the_best_items_and_do_not_depend_on_the_batch(exclude_seen: bool) -> None:
    events = _events(7)
    counts = RecentCounts(OPTIONS, events)
    seen = [[], [2], [3, 4], [5, 1, 6], [8, 7, 2, 3]]
    times = [30 * S, 61 * S, 61 * S, 100 * S, 119 * S]
    query = _query(times, seen)
    ids, scores = counts.recommend(query, 6, exclude_seen)
    for row, (now, before) in enumerate(zip(times, seen, strict=True)):
        values = {i: _definition(events, OPTIONS, now, before, i) for i in range(FIRST_ITEM, N)}
        best = sorted((i for i in values if not (exclude_seen and i in before)), key=lambda i: (-values[i], i))
        # Every item was chosen in the windows, so that all are candidates.
        assert ids[row][ids[row] != PAD].tolist() == best[:6]
        alone = RecentCounts(OPTIONS, events).recommend(_query([now], [before]), 6, exclude_seen)
        assert alone[0].tolist() == ids[row : row + 1].tolist()
        assert alone[1].tolist() == scores[row : row + 1].tolist()


def test_without_any_event_lists_are_empty() -> None:
    none = np.zeros(0, np.int64)
    ids, scores = RecentCounts(OPTIONS, Steps(none, none, none)).recommend(_query([5 * S], [[2, 3]]), 4, True)
    assert ids.tolist() == [[PAD] * 4] and np.isneginf(scores).all()
