"""A model's lists in the order of recent counts, too: the formula, the learned weight, and a whole run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.optimize import minimize

import recray
from helpers.inline_tasks import inline_prepare
from helpers.small_run import small_config
from recray.artifacts import INDEX, REPORT, Run, in_use
from recray.config import Config, parse_config
from recray.data.dataset import PreparedDataset
from recray.errors import ConfigError
from recray.ids import SPLITS
from recray.inference import LoadedRetriever
from recray.retrieval import recency
from recray.retrieval.events import read_steps


def test_the_weights_maximise_the_likelihood() -> None:
    rng = np.random.default_rng(0)
    row_C = np.sort(rng.integers(0, 40, 600)) * 7  # any numbers
    x_CF = rng.normal(size=(600, 2))
    positive_C = np.zeros(600, bool)
    for row in np.unique(row_C):
        (at,) = np.nonzero(row_C == row)
        p = np.exp(x_CF[at] @ [1.3, -0.6])
        positive_C[rng.choice(at, 1 + row % 2, replace=False, p=p / p.sum())] = True

    def loss(w_F: np.ndarray) -> float:
        total = 0.0
        for row in np.unique(row_C):
            score = x_CF[row_C == row] @ w_F
            total -= sum(one - np.log(np.exp(score).sum()) for one in score[positive_C[row_C == row]])
        return total

    wanted = minimize(loss, np.zeros(2)).x
    assert np.allclose(recency.conditional_logit(row_C, x_CF, positive_C), wanted, atol=2e-4)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with recency, whose model was refitted."""
    found = small_config(
        tmp_path_factory.mktemp("recency"),
        "retrieval.recency.enabled=true",
        "retrieval.recency.window=2d",
        "retrieval.recency.popularity_window=1d",
        "training.refit=true",
        "evaluation.queries=event",
        'evaluation.baselines=["transitions"]',
    )
    inline_prepare(found)
    recray.train(found)
    recray.index(found)
    with pytest.raises(ConfigError, match="counts by time, and the log has none"):
        dataset = PreparedDataset.of(Run(found))
        timeless = dataset.record.model_copy(update={"has_time": False})
        recency.check_recency(found, PreparedDataset(dataset.uri, timeless))
    recray.evaluate(found)
    return found


def test_a_report_has_the_stage_and_new_users_apart(config: Config) -> None:
    report = in_use(config.run_uri, REPORT).record
    assert set(report.metrics) == {"model", "index", "recency", "transitions"}
    assert {(one.system, one.other) for one in report.comparisons} >= {("recency", "index"), ("recency", "transitions")}
    assert set(report.new_users) == {"recency", "transitions"}
    # Without items of the user both order by the same probabilities.
    assert report.new_users["recency"] == report.new_users["transitions"]
    assert report.counts["queries_without_history"] > 0


def test_the_weight_is_that_of_the_model_before_the_refit(config: Config) -> None:
    fitted = in_use(config.run_uri, INDEX).record.recency
    assert fitted is not None and fitted.targets > 0 and fitted.weight >= 0
    plain = config.model_copy(update={"training": config.training.model_copy(update={"refit": False})})
    recray.train(plain)
    recray.index(plain)
    other = in_use(config.run_uri, INDEX).record.recency
    assert other is not None and other.weight == pytest.approx(fitted.weight, rel=1e-6)
    assert other.mean_query != fitted.mean_query


def test_lists_after_the_log_are_ordered_as_of_its_end(config: Config, tmp_path: Path) -> None:
    recray.train(config)
    recray.index(config)
    recray.recommend(config, str(tmp_path / "lists"), k=5)
    model = recray.load(config.run_uri)
    assert isinstance(model, LoadedRetriever)
    users = model.inputs.users.keys.slice(0, 7).to_pylist()
    mine = model.recommend(users=users, k=5).to_pandas()
    lists = pq.read_table(tmp_path / "lists").to_pandas()
    for user in users:
        assert mine[mine.user == user].item.tolist() == lists[lists.user == user].sort_values("rank").item.tolist()
    # By the definition, over all items of one user.
    dataset = PreparedDataset.of(Run(config)).refitted()
    stage = model._final
    assert isinstance(stage, recency.WithRecency)
    assert stage.as_of == read_steps(dataset, SPLITS).time.max() + 1
    batch, seen = model.inputs.batch(model.inputs.of_users([users[0]])[0])
    q_D = stage.exact.model.query_vectors(batch)[0] - stage.mean_query_D
    items = np.arange(2, dataset.record.num_items)
    query = recency.EvalQuery(batch, seen, seen, torch.tensor([stage.as_of]))
    p = stage.counts.probabilities(query, np.zeros(len(items), np.int64), items)
    scores = np.log(p) + stage.weight * (stage.exact.vectors_ND[items] @ q_D).detach().numpy()
    had = set(seen.values.tolist())
    best = [int(i) for i in items[np.argsort(-scores, kind="stable")] if int(i) not in had][:5]
    keys = dataset.items()["item"].to_pylist()
    assert mine[mine.user == users[0]].item.tolist() == [keys[one] for one in best]


def test_a_given_weight_is_not_learned_and_wrong_settings_are_refused(config: Config) -> None:
    given = config.retrieval.recency.model_copy(update={"model_weight": 0.25})
    set_ = config.model_copy(update={"retrieval": config.retrieval.model_copy(update={"recency": given})})
    with pytest.raises(ConfigError, match="needs an index with its weight and counts: run `recray index`"):
        recray.evaluate(set_)
    record = recray.index(set_)
    assert record.recency is not None and (record.recency.weight, record.recency.targets) == (0.25, 0)
    with pytest.raises(ConfigError, match="order the same lists: set item_knn_weight = 0"):
        parse_config({"retrieval": {"item_knn_weight": 1.0, "recency": {"enabled": True}}})
    with pytest.raises(ConfigError, match="not a duration"):
        parse_config({"retrieval": {"recency": {"window": "soon"}}})
