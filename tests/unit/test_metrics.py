"""Ranking metrics against trec_eval and torchmetrics, and by hand."""

import numpy as np
import pytest
import torch

from recray.metrics import ranking
from recray.metrics.beyond_accuracy import ListCounts

K = 10


def _random(seed: int, users: int = 60, items: int = 150) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Rankings from scores with many ties; some targets are outside what can be ranked."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(users, items)).round(1) - 3.0
    scores[:, :2] = -np.inf
    order = np.lexsort((np.tile(np.arange(items), (users, 1)), -scores), axis=1)
    targets = [rng.choice(np.arange(2, items + 30), rng.integers(1, 25), replace=False) for _ in range(users)]
    return order[:, :K], targets, scores


def _values(ranked_BK: np.ndarray, targets: list[np.ndarray], ks: list[int]) -> dict[str, np.ndarray]:
    flat = np.concatenate(targets)
    offsets = np.concatenate([[0], np.cumsum([len(t) for t in targets])])
    return ranking.per_user(ranking.hits(ranked_BK, flat, offsets), ranking.num_distinct(flat, offsets), ks)


@pytest.mark.parametrize("seed", range(3))
def test_equal_trec_eval(seed: int) -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    ranked_BK, targets, _ = _random(seed)
    qrel = {str(u): {str(i): 1 for i in t} for u, t in enumerate(targets)}
    # Rank as score, so that ties are settled as in our ranking; K items only, so that recip_rank is cut at K.
    run = {str(u): {str(i): float(K - r) for r, i in enumerate(row)} for u, row in enumerate(ranked_BK)}
    names = {"recall_5,10", "success_5,10", "ndcg_cut_5,10", "map_cut_5,10", "recip_rank"}
    theirs = pytrec_eval.RelevanceEvaluator(qrel, names).evaluate(run)
    ours = _values(ranked_BK, targets, [5, K])
    pairs = {"recall": "recall", "success": "hr", "ndcg_cut": "ndcg", "map_cut": "map"}
    for trec, own in pairs.items():
        for k in (5, K):
            expected = [theirs[str(u)][f"{trec}_{k}"] for u in range(len(targets))]
            np.testing.assert_allclose(ours[f"{own}@{k}"], expected, atol=1e-9)
    np.testing.assert_allclose(ours[f"mrr@{K}"], [theirs[str(u)]["recip_rank"] for u in range(len(targets))], atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_equal_torchmetrics_fed_with_ranks(seed: int) -> None:
    retrieval = pytest.importorskip("torchmetrics.functional.retrieval")
    ranked_BK, targets, scores = _random(seed)
    ours = _values(ranked_BK, targets, [K])
    for user, row in enumerate(ranked_BK):
        catalogue = np.union1d(np.arange(scores.shape[1]), targets[user])
        preds = torch.zeros(len(catalogue), dtype=torch.float64)
        for r, item in enumerate(row):
            preds[int(np.searchsorted(catalogue, item))] = K - r
        relevant = torch.from_numpy(np.isin(catalogue, targets[user]))
        for own, function in {
            "recall": retrieval.retrieval_recall,
            "hr": retrieval.retrieval_hit_rate,
            "mrr": retrieval.retrieval_reciprocal_rank,
        }.items():
            assert abs(float(function(preds, relevant, top_k=K)) - ours[f"{own}@{K}"][user]) < 1e-6


def test_by_hand() -> None:
    values = _values(np.array([[5, 7, 9]]), [np.array([7, 11])], [1, 3])
    assert values["recall@3"][0] == 1 / 2
    assert values["recall_capped@1"][0] == 0
    assert values["hr@3"][0] == 1
    assert values["mrr@3"][0] == 1 / 2
    assert values["mrr@1"][0] == 0
    assert values["map@3"][0] == (1 / 2) / 2
    assert values["ndcg@3"][0] == pytest.approx((1 / np.log2(3)) / (1 + 1 / np.log2(3)))


def test_padding_and_unknown_never_hit_and_every_unknown_target_is_a_miss() -> None:
    values = _values(np.array([[0, 1, 4]]), [np.array([1, 1, 4, 4])], [3])
    assert values["recall@3"][0] == 1 / 3  # unknown, unknown, 4


def test_lists_by_hand() -> None:
    lists = ListCounts(np.zeros(6, np.int64))
    vectors = np.array([[0, 0], [0, 0], [1, 0], [0, 1], [1, 0], [-1, 0]], float)
    lists.add(np.array([[2, 3], [2, 4]]), vectors)
    values = lists.metrics(2, np.array([0, 0, 4, 2, 1, 1]), num_users=4)
    assert values["coverage@2"] == 3 / 4
    assert values["ild@2"] == (1 + 0) / 2
    assert values["arp@2"] == (4 + 4 + 2 + 1) / 4
    assert values["novelty@2"] == (0 + 0 + 1 + 2) / 4
    # counts 0, 1, 1, 2 sorted: sum (2i - n - 1) x_i / (n sum x)
    assert values["gini@2"] == pytest.approx((-3 * 0 - 1 * 1 + 1 * 1 + 3 * 2) / (4 * 4))


def test_bootstrap_covers_the_mean_and_repeats() -> None:
    values = np.random.default_rng(0).normal([0.0, 5.0], [1.0, 3.0], (400, 2))
    low, high = ranking.bootstrap(values, 2000, seed=1)
    # The normal interval of a mean is 2 x 1.96 standard errors wide.
    assert high - low == pytest.approx(2 * 1.96 * values.std(axis=0) / 20, rel=0.1)
    assert (low < values.mean(axis=0)).all() and (values.mean(axis=0) < high).all()
    assert (np.stack(ranking.bootstrap(values, 2000, seed=1)) == [low, high]).all()


def test_bootstrap_is_the_plain_loop_over_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several resamples are multiplied at once, which adds in another order: 1e-12 of the value at most."""
    rng = np.random.default_rng(0)
    sums, sizes, means = rng.random((300, 5)), rng.integers(1, 4, 300).astype(float), []
    drawn = np.random.default_rng(7)
    for _ in range(64):
        times = np.bincount(drawn.integers(0, 300, 300), minlength=300)
        means.append(times @ sums / (times @ sizes))
    wanted = np.quantile(means, [0.025, 0.975], axis=0)
    for at_once in (1, 700, 1 << 22):
        monkeypatch.setattr(ranking, "_TIMES", at_once)
        assert np.allclose(ranking.bootstrap_sums(sums, sizes, 64, 7), wanted, rtol=1e-12, atol=0)
