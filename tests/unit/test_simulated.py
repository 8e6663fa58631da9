"""The simulator: the same from any grouping of users, Zipf, and an oracle worth its name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recray.config import SimulatedOptions
from recray.data.sources import simulated
from recray.data.sources.simulated import SimulatedOracle, World

SMALL = SimulatedOptions(events=40_000, users=800, items=2_000)


def _log(options: SimulatedOptions, seed: int, block: int) -> pa.Table:
    world = World.build(options, seed)
    starts = range(0, options.users, block)
    return pa.concat_tables(
        [simulated.simulate(world, np.arange(s, min(s + block, options.users))) for s in starts]
    ).combine_chunks()


@pytest.fixture(scope="module")
def log() -> pa.Table:
    return _log(SMALL, 3, 800)


def test_blocks_of_any_size_give_the_same_events(log: pa.Table) -> None:
    assert _log(SMALL, 3, 97).equals(log)


def test_another_seed_gives_other_events(log: pa.Table) -> None:
    assert not _log(SMALL, 4, 800)["item"].equals(log["item"])


def test_sizes_and_ranges(log: pa.Table) -> None:
    assert abs(len(log) - SMALL.events) < 0.1 * SMALL.events
    user, time, item = (log[c].to_numpy() for c in ("user", "time", "item"))
    assert (np.diff(time)[np.diff(user) == 0] > 0).all()
    assert time.min() >= simulated.START_US
    assert time.max() < simulated.START_US + 32 * 86_400_000_000
    assert item.min() >= 0 and item.max() < SMALL.items
    assert len(np.unique(log["order"].to_numpy())) == len(log)
    assert set(log["context_device"].unique().to_pylist()) == set(simulated.DEVICES)


def test_few_repeats(log: pa.Table) -> None:
    pairs = log["user"].to_numpy() * SMALL.items + log["item"].to_numpy()
    assert len(np.unique(pairs)) > 0.9 * len(pairs)


def test_popularity_is_zipf(log: pa.Table) -> None:
    counts = np.sort(np.bincount(log["item"].to_numpy(), minlength=SMALL.items))[::-1]
    rank = np.arange(10, 500)
    slope = np.polyfit(np.log(rank), np.log(counts[rank] + 0.5), 1)[0]
    assert -1.2 < slope < -0.4  # flatter than -zipf: a user takes a popular item once
    assert counts[:200].sum() > 0.3 * counts.sum()


def test_items_have_category_price_and_tags() -> None:
    items = World.build(SMALL, 3).item_table()
    assert items["item"].to_pylist() == list(range(SMALL.items))
    assert len(items["item_category"].unique()) == SMALL.categories
    assert np.isfinite(items["item_price"].to_numpy()).all()
    assert all(len(tags) == 2 for tags in items["item_tags"].to_pylist())


def test_probabilities_sum_to_one_over_items() -> None:
    world = World.build(SMALL, 3)
    z_FD = np.random.default_rng(0).standard_normal((5, SMALL.interests))
    p_FL = world.leaf_probabilities(z_FD, np.zeros(5, np.int64))
    p_FN = p_FL[:, world.leaf_N] * world.weight_N / world.total_L[world.leaf_N]
    np.testing.assert_allclose(p_FN.sum(axis=1), 1.0)


def test_draws_follow_the_stated_probabilities() -> None:
    world = World.build(SMALL, 3)
    leaf = 7
    u = simulated.uniform(1, np.arange(1), 0, np.arange(200_000)[None])[0]
    drawn = np.bincount(world.draw_items(np.full(len(u), leaf), u), minlength=SMALL.items) / len(u)
    expected = np.where(world.leaf_N == leaf, world.weight_N / world.total_L[leaf], 0.0)
    assert np.abs(drawn - expected).max() < 0.005


def test_uniform_numbers_are_uniform_and_streams_differ() -> None:
    u_BK = simulated.uniform(1, np.arange(500), 2, np.arange(200)[None])
    assert abs(u_BK.mean() - 0.5) < 0.005
    assert abs(u_BK.var() - 1 / 12) < 0.002
    assert abs(np.corrcoef(u_BK[:-1].ravel(), u_BK[1:].ravel())[0, 1]) < 0.02
    assert not np.array_equal(u_BK, simulated.uniform(1, np.arange(500), 3, np.arange(200)[None]))


def _ndcg(tops: list[np.ndarray], targets: list[np.ndarray]) -> float:
    gains = 1 / np.log2(np.arange(2, 12))
    each = []
    for top, wanted in zip(tops, targets, strict=True):
        hits = np.isin(top[:10], wanted)
        each.append((hits * gains[: len(hits)]).sum() / gains[: min(10, len(set(wanted.tolist())))].sum())
    return float(np.mean(each))


def test_oracle_is_far_above_popularity(log: pa.Table) -> None:
    user, item, time = (log[c].to_numpy() for c in ("user", "item", "time"))
    at = int(np.quantile(time, 0.9))
    train = time < at
    users = np.intersect1d(user[train], user[~train])
    seen = [item[train & (user == u)] for u in users]
    targets = [item[~train & (user == u)] for u in users]
    oracle = SimulatedOracle(SMALL, 3)
    best = oracle(users.tolist(), at, 10, seen)
    popular = np.argsort(-np.bincount(item[train], minlength=SMALL.items), kind="stable")
    simple = [popular[~np.isin(popular, s)] for s in seen]
    assert all(len(top) == 10 and not np.isin(top, s).any() for top, s in zip(best, seen, strict=True))
    assert _ndcg(best, targets) > 3 * _ndcg(simple, targets)
    again: list[Any] = oracle(users.tolist()[:7], at, 10, seen[:7])
    assert all(np.array_equal(a, b) for a, b in zip(again, best, strict=False))


def test_oracle_with_fewer_items_than_k() -> None:
    options = SimulatedOptions(events=1_000, users=20, items=12, categories=3)
    (top,) = SimulatedOracle(options, 1)([5], simulated.START_US, 50, [np.array([0, 3])])
    assert sorted(top.tolist()) == [i for i in range(12) if i not in (0, 3)]


@pytest.mark.parametrize("options", [{"items": 10, "categories": 40}, {"items": 5_000, "zipf": 0.0}, {"drift": 1.0}])
def test_odd_options(options: dict[str, Any]) -> None:
    made = _log(SimulatedOptions(**{"events": 2_000, "users": 50, "items": 100, **options}), 1, 50)
    assert len(made) > 1_000
