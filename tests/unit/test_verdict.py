"""What evaluate counts, and what it says: intervals over users, targets out of reach, the verdict in words."""

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from recray.config import Config, parse_config
from recray.data import user_rows
from recray.evaluation.lists import _names, _Part, _Scorer
from recray.loading.collate import eval_queries
from recray.metrics import ranking
from recray.records import CheckpointRecord, Comparison, Interval, ReportRecord
from recray.report.text import render
from recray.report.verdict import verdict


def test_intervals_of_several_rows_per_user_resample_users() -> None:
    rng = np.random.default_rng(0)
    user = rng.integers(0, 40, 600)
    values = rng.normal(size=40)[user][:, None] + 0.1 * rng.normal(size=(600, 2))  # rows of a user are alike
    low, high = ranking.bootstrap(values, 2_000, 1, user)
    frame = pd.DataFrame(values).groupby(user)
    draws = np.random.default_rng(2).integers(0, 40, (2_000, 40))
    means = frame.sum().to_numpy()[draws].sum(1) / frame.size().to_numpy()[draws].sum(1)[:, None]
    assert np.allclose([low, high], np.quantile(means, [0.025, 0.975], axis=0), atol=0.03)
    by_row = ranking.bootstrap(values, 2_000, 1)
    assert (high - low > 2 * (by_row[1] - by_row[0])).all()


def test_one_row_per_user_is_resampled_as_before() -> None:
    values = np.random.default_rng(0).random((50, 3))
    assert np.array_equal(ranking.bootstrap(values, 100, 1), ranking.bootstrap(values, 100, 1, np.arange(50) * 7))


@pytest.mark.parametrize(
    ("queries", "filter_seen"), [("user", True), ("user", False), ("event", True), ("event", False)]
)
def test_targets_that_cannot_be_hit_are_counted(queries: Any, filter_seen: bool) -> None:
    rows = [([2, 3, 2, 5, 5, 1], 4), ([4, 6], 2), ([3, 1, 1], 2)]  # items, number of targets
    items = pa.array([row for row, _ in rows], pa.list_(pa.int32()))
    times = pa.array([list(range(len(row))) for row, _ in rows], pa.list_(pa.int64()))
    table = pa.table({"user": [2, 3, 4], "item": items, "time": times, "num_targets": [n for _, n in rows]})
    config = parse_config({"evaluation": {"k": [2, 3], "filter_seen": filter_seen, "queries": queries}})
    scorer, part = _Scorer({}, None, np.zeros((7, 1)), config), _Part({}, {})
    for query in eval_queries(table, 2, 5, queries):
        scorer.score(query, part)
    # User 2 is asked for 2 (seen), 5, 5, 1 (unknown), user 4 for 1, 1; user 3 has no history, in "event" after one event.
    wanted = {
        "user": {
            "queries": 2,
            "queries_without_history": 1,
            "targets": 6,
            "targets_without_history": 2,
            "unknown_targets": 3,
        },
        "event": {
            "queries": 7,
            "queries_without_history": 1,
            "targets": 7,
            "targets_without_history": 1,
            "unknown_targets": 3,
        },
    }[queries]
    seen = {"user": 1, "event": 2}[queries]  # the second 5 comes after the first one
    assert part.counts == Counter(wanted | {"seen_targets": seen})
    reached = dict(zip(_names(config), np.concatenate(part.reachable).mean(0), strict=True))
    if queries == "event":
        share = (7 - 3 - (seen if filter_seen else 0)) / 7
        assert reached["hr@2"] == reached["ndcg@3"] == reached["recall@2"] == pytest.approx(share)
    else:  # distinct targets: 2, 5 and the unknown item; two unknown items
        assert reached["recall@3"] == pytest.approx(((1 if filter_seen else 2) / 3 + 0) / 2)
        assert reached["hr@3"] == 0.5


@pytest.mark.parametrize("min_history", [1, 2, 5])
def test_early_events_and_targets_are_all_events(min_history: int) -> None:
    rng = np.random.default_rng(min_history)
    user = np.sort(rng.integers(0, 20, 120))
    code = np.concatenate([np.sort(rng.integers(0, 3, n)) for n in np.bincount(user)])
    positive = rng.random(120) < 0.7
    for number, split in enumerate(("train", "valid", "test")):
        early = user_rows.early_rows(user, code, split, positive, min_history)
        targets = user_rows.rows(user, code, split, positive, min_history).targets()
        both = np.sort(np.concatenate([early.index, targets[positive[targets]]]))
        assert both.tolist() == np.flatnonzero((code == number) & positive).tolist()
        assert early.num_targets_R.sum() == len(early.index) and (early.num_targets_R > 0).all()


CONFIG = parse_config({"training": {"epochs": 30}})


def _report(**changes: Any) -> ReportRecord:
    values = {"model": 0.2, "popularity": 0.1, "item_knn": 0.15}
    counts = {"queries": 100, "users": 80, "targets": 200, "queries_without_history": 10, "targets_without_history": 50}
    counts |= {"unknown_targets": 20, "seen_targets": 2, "short_lists": 0, "catalogue": 50}
    body: dict[str, Any] = {
        "split": "test",
        "config": CONFIG.model_dump(mode="json"),
        "metrics": {
            name: {f"{metric}@10": Interval(value=value) for metric in ("recall", "hr", "ndcg", "mrr", "map", *BEYOND)}
            for name, value in values.items()
        },
        "counts": counts,
    }
    return ReportRecord(**body | changes)


BEYOND = ("coverage", "gini", "arp", "novelty", "ild")


def _checkpoint(best: int, trained: int) -> CheckpointRecord:
    history = [{"epoch": float(n)} for n in range(trained)]
    return CheckpointRecord(
        epoch=best, step=1, rows=1, metric="ndcg@10", value=0.1, best_epoch=best, history=history, dataset_uri=""
    )


def _said(report: ReportRecord, config: Config = CONFIG, best: int = 4, trained: int = 9) -> str:
    return "\n".join(verdict(report, _checkpoint(best, trained), config))


@pytest.mark.parametrize(
    ("gain", "low", "high", "said"),
    [
        (0.1, 0.05, 0.15, "the model is better than item-item baseline: ndcg@10 by 0.1000 (0.0500 to 0.1500)"),
        (-0.1, -0.15, -0.05, "the model is worse than item-item baseline: ndcg@10 by 0.1000 (0.0500 to 0.1500)"),
        (
            0.1,
            -0.01,
            0.2,
            "no clear difference between the model and item-item baseline: ndcg@10 +0.1000 (-0.0100 to +0.2000)",
        ),
        (
            0.1,
            None,
            None,
            "the model against item-item baseline: ndcg@10 +0.1000, without an interval (evaluation.bootstrap = 0)",
        ),
    ],
)
def test_better_is_said_only_where_the_interval_says_so(gain: float, low: float, high: float, said: str) -> None:
    one = Comparison(system="model", other="item_knn", metric="ndcg@10", gain=gain, low=low, high=high)
    found = _said(_report(comparisons=[one]))
    assert said in found
    assert ("retrieval.item_knn_weight" in found) == (low is None or low < 0)


def test_where_the_model_lies_below_popularity_nothing_says_otherwise() -> None:
    metrics = _report().metrics
    at = {"popularity": 0.0624, "model": 0.0344, "oracle": 0.3207}
    metrics |= {name: {f"{m}@10": Interval(value=v) for m in ("ndcg", *BEYOND)} for name, v in at.items()}
    found = _said(_report(metrics=metrics))
    assert (
        "popularity 0.0624, the model 0.0344, the oracle 0.3207; the model has nothing of what can be learned" in found
    )
    assert "<=" not in found


def test_the_verdict_names_what_cannot_be_hit_epochs_and_the_index() -> None:
    report = _report(index={"recall@100_against_exact": 0.93, "ndcg@10_lost": -0.01, "recall@10_lost": -0.02})
    found = _said(report, best=30, trained=30)
    assert (
        "11.0% of the targets cannot be hit: 10.0% are items that the model does not know, 1.0% are items that" in found
    )
    assert "20.0% of all targets are of users without a history" in found
    assert "best epoch 30 of 30: train longer" in found and "try next: more epochs" in found
    assert (
        "the index loses 0.0100 of ndcg@10 (5.0%) against exact search" in found and "retrieval.recall_target" in found
    )
    same = _report(index={"recall@100_against_exact": 1.0, "ndcg@10_lost": 1e-9})
    assert "the index loses no ndcg@10 against exact search" in _said(same)
    assert "training.refit = true" in found
    assert "best epoch 4 of 9, chosen on validation" in _said(report)
    assert "try next: a lower learning rate" in _said(report, best=1)
    free = parse_config({"evaluation": {"filter_seen": False}})
    assert "10.0% of the targets cannot be hit" in _said(report, free)
    page = render(report.model_copy(update={"left_out": {"item_knn": "it is too large"}, "verdict": ["a sentence"]}))
    assert page.splitlines()[1].startswith(
        "at most 89.0% of the targets can be hit: 10.0% are unknown items, 1.0% had been"
    )
    assert "10 queries with 50 targets (20.0% of all)" in page.splitlines()[2]
    assert page.endswith("verdict\n  a sentence\n  item-item baseline is left out: it is too large")


@pytest.mark.parametrize(
    ("value", "low", "high", "said"),
    [
        (0.8, 0.7, 0.9, "probabilities are better than the share of clicks"),
        (1.2, 1.1, 1.3, "probabilities are worse than the share of clicks"),
        (1.01, 0.99, 1.03, "probabilities are no clear improvement on the share of clicks"),
    ],
)
def test_a_ranker_is_compared_with_the_share_of_clicks(value: float, low: float, high: float, said: str) -> None:
    metrics = {
        "model": {"auc": Interval(value=0.7), "normalized_entropy": Interval(value=value, low=low, high=high)},
        "popularity": {"auc": Interval(value=0.3551)},
    }
    counts = {"impressions": 100, "clicks": 50, "users": 9, "unknown_items": 3}
    found = _said(_report(kind="clicks", metrics=metrics, counts=counts))
    assert said in found and "popularity has AUC 0.3551" in found and "the opposite order has 0.6449" in found
    assert ("lower learning rate: the model is sure where it is wrong" in found) == (value > 1)
    metrics["popularity"]["auc"] = Interval(value=0.4962, low=0.485, high=0.507)
    assert "opposite order" not in _said(_report(kind="clicks", metrics=metrics, counts=counts))
