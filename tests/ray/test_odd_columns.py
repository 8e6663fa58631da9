"""Columns and rows that break other people's trainers: they train and score, or are refused by name."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import recray
from recray.config import parse_config
from recray.data.dataset import PreparedDataset

pytestmark = pytest.mark.usefixtures("ray_local")
EVENTS = 900
# The log's columns under the names of other roles, of recray's own columns, and under ones that torch refuses for modules.
NAMES = {"user_id": "split", "item_id": "time", "timestamp": "label", "label": "item"} | {
    "tags": "type",
    "price": "price.usd",
    "constant": "code",
    "nothing": "bucket",
    "amount": "two\nlines",
}
CONTEXT = ["type", "price.usd", "code", "bucket", "two\nlines"]


def _log(seed: int = 0) -> pa.Table:
    """Impressions with a list column of 0 and of 10,000 entries, and numbers that are constant, all null, or infinite."""
    rng = np.random.default_rng(seed)
    tags = [rng.integers(0, 50, 3).tolist() for _ in range(EVENTS)]
    tags[5], tags[6], tags[700] = [], None, rng.integers(0, 50, 10_000).tolist()
    price = rng.normal(size=EVENTS)
    price[[3, 4, 800, 801]] = [np.inf, -np.inf, np.nan, 1e30]
    return pa.table(
        {
            "user_id": rng.integers(0, 60, EVENTS),
            "item_id": rng.integers(0, 40, EVENTS),
            "timestamp": np.sort(rng.integers(0, 10_000_000, EVENTS)) + 1_600_000_000,
            "label": rng.integers(0, 2, EVENTS),
            "tags": pa.array(tags, pa.list_(pa.int64())),
            "price": price,
            "constant": np.full(EVENTS, 7.0),
            "nothing": pa.array([None] * EVENTS, pa.float64()),
            "amount": rng.lognormal(size=EVENTS),
        }
    )


@pytest.mark.parametrize("model", ["din", "dlrm", "dcn_v2", "wide_deep"])
def test_odd_columns_train_and_score(model: str, tmp_path: Path) -> None:
    log = _log().rename_columns(NAMES)
    pq.write_table(log, tmp_path / "log.parquet")
    review_counts = pa.array([7] * 20 + [9] * 20)
    items = pa.table({"time": range(40), "count": review_counts, "item": [f"title {i % 3}" for i in range(40)]})
    pq.write_table(items, tmp_path / "items.parquet")
    table = {
        "run": {"output": str(tmp_path)},
        "data": {
            "path": str(tmp_path / "log.parquet"),
            "items": str(tmp_path / "items.parquet"),
            "columns": {"user": "split", "item": "time", "timestamp": "label", "label": "item", "context": CONTEXT},
            "context_features": {
                "type": {"kind": "list", "hash_buckets": 32},
                "two\nlines": {"kind": "numeric", "scale": "quantiles", "quantiles": 8},
            },
            "split": {"valid": 0.2, "test": 0.2},
            "shard_events": 300,
        },
        "model": {"name": model, "dim": 4, "hidden": [8]},
        "training": {"epochs": 1, "global_batch_size": 64},
        "scaling": {"num_workers": 0},
        "evaluation": {"bootstrap": 0},
    }
    config = parse_config(table)
    recray.prepare(config)
    dataset = PreparedDataset.open(f"{config.run_uri}/dataset/current")
    train = log.filter(pc.less(log["label"], dataset.record.split["valid_start"] / 1e6))
    chosen = Counter(train.filter(pc.equal(train["item"], 1))["time"].to_pylist())
    table = dataset.items().slice(2)
    assert dict(zip(table["item"].to_pylist(), table["count"].to_pylist(), strict=True)) == {
        item: chosen[item] for item in set(train["time"].to_pylist())
    }
    features = {(feature.role, feature.name): feature for feature in dataset.record.features}
    assert features["item", "count"].vocabulary is not None and set(features["item", "count"].vocabulary) == {7, 9}
    assert features["context", "code"].std == 1.0 and features["context", "bucket"].mean == 0.0
    assert features["context", "price.usd"].mean < 1e6, (
        "a value of 1e30 lies in the test period; train alone is fitted on"
    )
    record = recray.train(config)
    assert all(np.isfinite(entry["loss"]) for entry in record.history)
    report = recray.evaluate(config)
    assert np.isfinite(report.metrics["model"]["log_loss"].value)
    # A user and an item that training never saw are among those scored.
    assert (
        report.counts["impressions"] == dataset.record.counts["events_test"] + dataset.record.counts["negatives_test"]
    )
