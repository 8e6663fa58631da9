"""Baselines against their formulas, written out densely."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from recray import registry, storage
from recray.config import parse_config
from recray.config.baselines import RecentPopularityOptions, RollingPopularityOptions
from recray.data.dataset import PreparedDataset
from recray.errors import ConfigError, NotApplicableError
from recray.ids import PAD, UNKNOWN
from recray.loading.batch import Batch
from recray.loading.collate import eval_queries
from recray.models import Ranker, Retriever
from recray.records import DatasetRecord, Feature, Shard
from recray.retrieval import Recommender, embed
from recray.retrieval.baselines import hindsight, item_knn, open_baselines, recent_popularity, rolling_popularity
from recray.retrieval.baselines.popularity import Popularity
from recray.retrieval.blend import Blended
from recray.retrieval.events import event_counts, read_steps
from recray.retrieval.exact import ExactSearch
from recray.retrieval.recommenders import Reranked

N = 12  # item ids 2..11
S = 1_000_000  # microseconds


def _table(rows: list[list[int]], num_targets: list[int], first_time: int) -> pa.Table:
    return pa.table(
        {
            "user": pa.array(range(2, 2 + len(rows)), pa.int32()),
            "item": pa.array(rows, pa.list_(pa.int32())),
            "time": pa.array([[(first_time + i) * S for i in range(len(row))] for row in rows], pa.list_(pa.int64())),
            "num_targets": pa.array(num_targets, pa.int32()),
        }
    )


@pytest.fixture
def dataset(tmp_path: Path) -> PreparedDataset:
    train = [[2, 3, 4], [3, 2], [5, 2, 6, 7], [8], [4, 9, 10]]
    tables = {
        "train": _table(train, [3, 2, 4, 1, 3], 0),
        "valid": _table([[2, 3, 4, 11, 10], [3, 2, 10]], [2, 1], 0),
        "test": _table([[2, 3, 4, 5], [8, 6], [4, 9, 10, 2, 3]], [1, 1, 2], 0),
    }
    shards = {}
    for name, table in tables.items():
        storage.write_table(f"{tmp_path}/{name}/a.parquet", table)
        events = sum(table["num_targets"].to_pylist())
        shards[name] = [Shard(file=f"{name}/a.parquet", rows=len(table), events=events, impressions=events)]
    counts = np.bincount(np.concatenate(train), minlength=N)
    storage.write_table(f"{tmp_path}/items.parquet", pa.table({"item": np.arange(N), "count": counts}))
    split = {"valid_start": 3 * S, "test_start": 5 * S, "last": 9 * S}
    DatasetRecord(
        config={},
        fingerprint="f",
        num_items=N,
        num_users=7,
        counts=dict.fromkeys(("events_train", "events_valid"), 13),
        shards=shards,
        seed=0,
        split=split,
    ).write(str(tmp_path))
    return PreparedDataset.open(str(tmp_path))


def _brute(scores_N: np.ndarray, seen: list[int], k: int) -> list[int]:
    order = [i for i in sorted(range(2, N), key=lambda i: (-scores_N[i], i)) if i not in seen]
    return (order + [0] * k)[:k]


@pytest.mark.parametrize("filter_seen", [True, False])
@pytest.mark.parametrize("k", [3, 10])
def test_popularity_leaves_out_what_was_seen(dataset: PreparedDataset, filter_seen: bool, k: int) -> None:
    counts = dataset.item_counts()
    (table,) = dataset.iter_tables("test")
    (question,) = eval_queries(table, 8, 5, "user")
    found = Popularity(counts).recommend(question, k, filter_seen)[0]
    seen = [[2, 3, 4], [8], [4, 9, 10]]
    assert found.tolist() == [_brute(counts, one if filter_seen else [], k) for one in seen]


def test_recent_popularity_counts_the_window_before_the_split(dataset: PreparedDataset) -> None:
    (table,) = dataset.iter_tables("test")
    (question,) = eval_queries(table, 8, 5, "user")
    # Targets before 5 and from 3 on: 7 (train) and 11, 10 (valid); then by id.
    recent = np.isin(np.arange(N), [7, 10, 11]).astype(float)
    found = recent_popularity.build(RecentPopularityOptions(window="2s"), dataset, "test").recommend(
        question, 5, False
    )[0]
    assert found[0].tolist() == _brute(recent, [], 5)


@pytest.mark.parametrize(("split", "chosen"), [("valid", [11, 10, 10]), ("test", [5, 6, 2, 3])])
def test_hindsight_counts_the_split_itself(dataset: PreparedDataset, split: str, chosen: list[int]) -> None:
    (table,) = dataset.iter_tables("test")
    (question,) = eval_queries(table, 8, 5, "user")
    found = hindsight.build(hindsight.Options(), dataset, split).recommend(question, 6, True)[0]
    counts = np.bincount(chosen, minlength=N).astype(float)
    assert found.tolist() == [_brute(counts, seen, 6) for seen in ([2, 3, 4], [8], [4, 9, 10])]


def _rolling(
    time_E: np.ndarray, item_E: np.ndarray, time_B: np.ndarray, window: int | None, half_life: int
) -> np.ndarray:
    """Scores by the definition, one query after another."""
    scores = np.zeros((len(time_B), N))
    for row, now in enumerate(time_B):
        age_E, item = (now - time_E)[time_E < now], item_E[time_E < now]
        np.add.at(scores[row], item, np.exp2(-age_E / half_life) if window is None else age_E <= window)
    return scores


@pytest.mark.parametrize(("window", "half_life"), [(1, 0), (300, 0), (10**9, 0), (None, 1), (None, 40), (None, 10**6)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rolling_popularity_is_its_definition(window: int | None, half_life: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    time_E, item_E = rng.integers(-500, 2_000, 400), rng.integers(2, N, 400)
    time_B = np.concatenate(
        [rng.integers(-500, 2_500, 60), [-600, -600, 5_000], time_E[:5]]
    )  # before all, after all, at events
    built = rolling_popularity.RollingPopularity(time_E, item_E, N, window, half_life)
    wanted = _rolling(time_E, item_E, time_B, window, half_life)
    assert np.allclose(built.scores(time_B), wanted, rtol=1e-9, atol=0 if window else 1e-100)


def test_rolling_popularity_does_not_depend_on_how_queries_are_batched() -> None:
    rng = np.random.default_rng(0)
    time_E, item_E, time_B = rng.integers(0, 10**6, 5_000), rng.integers(2, N, 5_000), rng.integers(0, 10**6, 64)
    built = rolling_popularity.RollingPopularity(time_E, item_E, N, None, 3)  # 300,000 half-lives
    alone = np.concatenate([built.scores(time_B[i : i + 1]) for i in range(64)])
    assert np.allclose(built.scores(time_B), alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize("entries", [1, 3 * N, 1 << 23])  # one query at a time, three, and all of them
def test_rolling_popularity_counts_events_of_the_split_before_the_query(
    dataset: PreparedDataset, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rolling_popularity, "_ENTRIES", entries)
    built = rolling_popularity.build(RollingPopularityOptions(window="3s"), dataset, "test")
    (table,) = dataset.iter_tables("test")
    (query,) = eval_queries(table, 8, 5, "event")
    assert query.time_B.tolist() == [3 * S, 1 * S, 3 * S, 4 * S]
    # At 4 s, without what is older than the split's start less the window (2 s): train 6 (2), 10 (2), 7 (3), valid 10 (2),
    # 11 (3), test 5 and 2 (3).
    counts = np.bincount([4, 6, 10, 7, 10, 11, 5, 2], minlength=N)
    assert built.scores(query.time_B.numpy())[3].tolist() == counts.tolist()
    scores = built.scores(query.time_B.numpy())
    seen = [[2, 3, 4], [8], [4, 9, 10], [4, 9, 10, 2]]
    for exclude, without in ((False, [[]] * 4), (True, seen)):
        found = built.recommend(query, 4, exclude)[0].tolist()
        assert found == [_brute(row, had, 4) for row, had in zip(scores, without, strict=True)]


def test_steps_are_all_events_each_with_the_one_before_it(dataset: PreparedDataset) -> None:
    rows = [(2, [2, 3, 4, 11, 10]), (3, [3, 2, 10]), (4, [5, 2, 6, 7]), (5, [8, 6]), (6, [4, 9, 10, 2, 3])]
    wanted = {(time, item, ([PAD, *items])[time]) for _, items in rows for time, item in enumerate(items)}
    wanted |= {(3, 5, 4)}  # the first user has another fourth event in test than in validation
    steps = read_steps(dataset, ("train", "valid", "test"))
    assert {(t // S, i, p) for t, i, p in zip(*(one.tolist() for one in steps), strict=True)} == wanted
    later = read_steps(dataset, ("train", "valid", "test"), since=3 * S)
    assert sorted(later.item.tolist()) == sorted(i for t, i, _ in wanted if t >= 3)
    known = PreparedDataset(dataset.uri, dataset.record.model_copy(update={"num_items": 10}))
    assert sorted(read_steps(known, ("valid",)).item.tolist()) == [UNKNOWN] * 3


def test_rolling_popularity_needs_times_and_one_option(dataset: PreparedDataset) -> None:
    record = dataset.record.model_copy(update={"has_time": False})
    with pytest.raises(NotApplicableError, match="the log has no times: it needs"):
        rolling_popularity.build(RollingPopularityOptions(), PreparedDataset(dataset.uri, record), "test")
    with pytest.raises(ConfigError, match="has both window and half_life"):
        parse_config({"evaluation": {"baseline_options": {"rolling_popularity": {"window": "1h", "half_life": "1h"}}}})


def test_events_that_are_no_targets_are_counted(dataset: PreparedDataset) -> None:
    """With data.min_history: two users whose events are too few to be targets, and one whose first event is none."""
    storage.write_table(f"{dataset.uri}/early-train/a.parquet", _table([[11, 3], [11], [5]], [2, 1, 1], 3))
    record = dataset.record.model_copy(update={"early": {"train": ["early-train/a.parquet"]}})
    more = PreparedDataset(dataset.uri, record)
    added = event_counts(more, ["train", "valid"]) - event_counts(dataset, ["train", "valid"])
    assert added.tolist() == np.bincount([11, 3, 11, 5], minlength=N).tolist()
    options = RecentPopularityOptions(window="2s")
    (table,) = dataset.iter_tables("test")
    (query,) = eval_queries(table, 8, 5, "user")
    assert recent_popularity.build(options, more, "test").recommend(query, 1, False)[0].tolist() == [[11]] * 3
    (block,) = item_knn.ItemKNN(more, ("train", "valid")).blocks(query)
    wanted = _neighbours("test", [[2, 3, 4], [8], [4, 9, 10]], {2: [11, 3], 3: [11], 4: [5]})
    assert np.allclose(block[1].numpy(), wanted, atol=1e-6)


def test_shipped_baselines_are_built_like_others(dataset: PreparedDataset) -> None:
    names = registry.names("baseline")
    config = parse_config({"evaluation": {"baselines": names}})
    found, left_out = open_baselines(config, dataset, "test", {})
    assert sorted(found) == sorted(set(names) - {"oracle"}) and not left_out
    record = dataset.record.model_copy(update={"has_time": False, "counts": {"events_train": 10**8, "events_valid": 0}})
    found, left_out = open_baselines(config, PreparedDataset(dataset.uri, record), "test", {})
    assert sorted(left_out) == ["item_knn", "recent_popularity", "rolling_popularity", "transitions"]
    assert "100,000,000 events before the split, which are more than 50,000,000" in left_out["item_knn"]


BEFORE = {  # items of users 2 to 6 before each split; validation adds 11 and 10 to the first, 10 to the second
    "valid": [[2, 3, 4], [3, 2], [5, 2, 6, 7], [8], [4, 9, 10]],
    "test": [[2, 3, 4, 11, 10], [3, 2, 10], [5, 2, 6, 7], [8], [4, 9, 10]],
}


def _neighbours(split: str, seen: list[list[int]], early: dict[int, list[int]] | None = None) -> np.ndarray:
    """x D_i^-3/4 R' D_u^-1 R D_i^-1/4 in float64."""
    r, x = np.zeros((5, N)), np.zeros((len(seen), N))
    for user, items in enumerate(BEFORE[split]):
        r[user, items + (early or {}).get(user + 2, [])] = 1
    for row, items in enumerate(seen):
        x[row, items] = 1
    count = np.maximum(r.sum(0), 1)
    return (x * count**-0.75) @ r.T @ (r / r.sum(1, keepdims=True)) * count**-0.25


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("entries", [1, 1 << 25])  # one query at a time, and all of them
def test_item_knn_is_its_formula(
    dataset: PreparedDataset, split: str, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_knn, "_ENTRIES", entries)
    seen = [[2, 3, 4], [8], [4, 9, 10]]
    scores = _neighbours(split, seen)
    (table,) = dataset.iter_tables("test")
    (question,) = eval_queries(table, 8, 5, "user")
    built = item_knn.ItemKNN(dataset, ("train",) if split == "valid" else ("train", "valid"))
    found = np.concatenate([block.numpy() for _, block in built.blocks(question)])
    assert np.allclose(found, scores, atol=1e-6)
    lists, best_scores = built.recommend(question, 4, True)
    for row, had in enumerate(seen):
        best = [i for i in _brute(scores[row], had, 4) if scores[row, i] > 1e-9]
        assert lists[row].tolist()[: len(best)] == best
        assert np.allclose(best_scores[row, : len(best)], scores[row, best], atol=1e-6)


def test_item_knn_keeps_the_largest_entries_of_each_row(dataset: PreparedDataset) -> None:
    every, kept = (item_knn.ItemKNN(dataset, ("train", "valid"), most) for most in (0, 2))
    (table,) = dataset.iter_tables("test")
    (query,) = eval_queries(table, 8, 5, "user")
    matrix = _neighbours("test", [[item] for item in range(N)])  # rows of single items, which scale the scores only
    smallest = np.sort(matrix, axis=1)[:, -2:-1]
    truncated = np.where(matrix >= smallest * (1 - 1e-9), matrix, 0)
    for built, wanted in ((every, matrix), (kept, truncated)):
        ((_, scores),) = built.blocks(query)
        rows = [[2, 3, 4], [8], [4, 9, 10]]
        assert np.allclose(scores.numpy(), [wanted[items].sum(0) for items in rows], atol=1e-6)
        assert np.allclose(built.sums(query).numpy(), [matrix[items].sum() for items in rows], atol=1e-6)


@pytest.mark.parametrize(("all_up_to", "same_as"), [(N, 0), (N - 1, 2)])
def test_a_large_catalogue_keeps_fewer_neighbours(
    dataset: PreparedDataset, all_up_to: int, same_as: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_knn, "_ALL_UP_TO", all_up_to)
    monkeypatch.setattr(item_knn, "_KEPT", 2)
    by_size, given = (item_knn.ItemKNN(dataset, ("train", "valid"), most) for most in (None, same_as))
    assert np.array_equal(by_size._item, given._item) and np.array_equal(by_size._value, given._value)


@pytest.mark.parametrize("options", [{"window": 40}, {"half_life": 7}])
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_rolling_popularity_looks_at_few_items_and_finds_the_best_of_all(
    options: dict[str, int], exclude_seen: bool
) -> None:
    rng = np.random.default_rng(0)
    items, table = 400, _table(rng.integers(1, 400, (30, 6)).tolist(), [2] * 30, 0)
    times = pa.array(np.sort(rng.integers(0, 10_000, (30, 6)), axis=1).tolist(), pa.list_(pa.int64()))
    (query,) = eval_queries(table.set_column(2, "time", times), 64, 6, "user")
    both = {"window": None, "half_life": 1} | options
    built = rolling_popularity.RollingPopularity(
        rng.integers(0, 10_000, 2_000), rng.integers(2, items, 2_000), items, both["window"], both["half_life"] or 1
    )
    ids, _ = built.recommend(query, 20, exclude_seen)
    scores = built.scores(query.time_B.numpy()).astype(np.float32)
    for row, found in enumerate(ids.tolist()):
        had = query.seen.values[query.seen.offsets[row] : query.seen.offsets[row + 1]].tolist() if exclude_seen else []
        order = np.argsort(-scores[row], kind="stable")
        assert found == order[~np.isin(order, [0, 1, *had])][:20].tolist()


class _Fixed(Retriever):
    """One vector for every query."""

    def query_vectors(self, batch: Batch) -> torch.Tensor:
        return torch.tensor([[1.0, 0.5]]).expand(batch.num_rows, 2)

    def item_vectors(self, item_ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("filter_seen", [True, False])
@pytest.mark.parametrize("candidates", [2, 20])
def test_blend_orders_what_both_find_by_both_scores(
    dataset: PreparedDataset, filter_seen: bool, candidates: int
) -> None:
    seen = [[2, 3, 4], [8], [4, 9, 10]]
    vectors = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
    model, temperature, weight = _Fixed(), 0.5, 2.0
    (table,) = dataset.iter_tables("test")
    (question,) = eval_queries(table, 8, 5, "user")
    exact = ExactSearch(model, vectors)
    built = item_knn.ItemKNN(dataset, ("train", "valid"))
    blend = Blended(exact, exact, built, weight, temperature, candidates)
    ids, scores = blend.recommend(question, 4, filter_seen)
    by_neighbours = _neighbours("test", seen)
    by_model = (vectors @ torch.tensor([1.0, 0.5])).double().numpy()
    total = by_model / temperature + weight * np.log(by_neighbours / by_neighbours.sum(1, keepdims=True) + 1e-5)
    for row, had in enumerate(seen):
        had = had if filter_seen else []
        wanted = max(4, candidates)
        allowed = set(_brute(by_model, had, wanted)) | set(_brute(by_neighbours[row], had, wanted))
        best = _brute(np.where(np.isin(np.arange(N), list(allowed)), total[row], -1e9), had, 4)
        assert ids[row].tolist() == best
        assert np.allclose(scores[row], total[row, best], atol=1e-4)


class _ById(Ranker):
    """A ranker that prefers large item ids."""

    def logits(self, batch: Batch) -> torch.Tensor:
        assert batch.target_Q is not None
        return batch.target_Q.float()


@pytest.fixture
def recommenders(dataset: PreparedDataset) -> dict[str, Recommender]:
    vectors = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
    exact = ExactSearch(_Fixed(), vectors)
    built = item_knn.ItemKNN(dataset, ("train", "valid"))
    return {
        "exact": exact,
        "blended": Blended(exact, exact, built, 1.0, 0.5, 5),
        "reranked": Reranked(exact, _ById(), 5, 2, dataset.record),
        "popularity": Popularity(dataset.item_counts()),
        "rolling": rolling_popularity.build(RollingPopularityOptions(window="2s"), dataset, "test"),
        "hindsight": hindsight.build(hindsight.Options(), dataset, "test"),
        "item_knn": built,
    }


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("k", [3, 30])
def test_every_recommender_keeps_the_protocol(
    dataset: PreparedDataset, recommenders: dict[str, Recommender], k: int, exclude_seen: bool
) -> None:
    (table,) = dataset.iter_tables("test")
    (query,) = eval_queries(table, 8, 5, "user")
    for name, recommender in recommenders.items():
        ids, scores = recommender.recommend(query, k, exclude_seen)
        assert ids.shape == scores.shape == (3, k), name
        assert ids.dtype == np.int64 and scores.dtype == np.float32, name
        assert ((ids == PAD) == (scores == -np.inf)).all() and not (ids == UNKNOWN).any(), name
        assert all((row[:-1] >= row[1:]).all() for row in scores), name
        for row, seen in zip(ids, ([2, 3, 4], [8], [4, 9, 10]), strict=True):
            filled = row[row != PAD].tolist()
            assert len(filled) == len(set(filled)) and (not exclude_seen or not set(filled) & set(seen)), name


def test_a_ranker_reorders_the_candidates_and_nothing_else(
    dataset: PreparedDataset, recommenders: dict[str, Recommender]
) -> None:
    (table,) = dataset.iter_tables("test")
    (query,) = eval_queries(table, 8, 5, "user")
    candidates, _ = recommenders["exact"].recommend(query, 5, True)
    ids, scores = recommenders["reranked"].recommend(query, 4, True)
    assert ids.tolist() == [sorted(row, reverse=True)[:4] for row in candidates.tolist()]
    assert (scores == ids).all()


def test_a_ranker_that_knows_fewer_items_takes_the_others_as_unknown(
    dataset: PreparedDataset, recommenders: dict[str, Recommender]
) -> None:
    """A refitted retriever finds items that a ranker without a refit has no row for."""
    (table,) = dataset.iter_tables("test")
    (query,) = eval_queries(table, 8, 5, "user")
    ranked: list[Batch] = []

    class Kept(_ById):
        def logits(self, batch: Batch) -> torch.Tensor:
            ranked.append(batch)
            return super().logits(batch)

    known = dataset.record.model_copy(update={"num_items": 9})
    query.batch.context["page"] = torch.tensor([2, 3, 4])
    feature = Feature(name="page", role="context", kind="categorical", cardinality=4)
    known = known.model_copy(update={"features": [feature]})
    Reranked(recommenders["exact"], Kept(), 30, 3, known).recommend(query, 4, False)
    (batch,) = ranked
    assert batch.target_Q is not None
    assert sorted(set(batch.target_Q.tolist())) == [1, 2, 3, 4, 5, 6, 7, 8]
    histories = {tuple(x.tolist()) for x in batch.history.values.split(batch.history.lengths().tolist())}
    assert histories == {(2, 3, 4), (8,), (4, 1, 1)}
    assert isinstance(page := batch.context["page"], torch.Tensor) and set(page.tolist()) == {1, 2, 3}


def test_vectors_are_read_as_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "_CHUNK", 7)
    vectors = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    embed.save_vectors(str(tmp_path), vectors)
    assert (embed.load_vectors(str(tmp_path), 40) == vectors).all()
