"""Runs of all models on a log with text keys and every kind of feature, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import recray
from helpers.inline_tasks import inline_prepare
from recray.config import Config, parse_config

RETRIEVERS, RANKERS = ("two_tower", "sasrec"), ("din", "dlrm", "dcn_v2", "wide_deep")
_KINDS: dict[str, Any] = {
    "user_features": {
        "country": {"kind": "categorical"},
        "tags": {"kind": "list"},
        "age": {"kind": "numeric", "scale": "quantiles", "quantiles": 4},
    },
    "context_features": {
        "device": {"kind": "categorical", "min_count": 5},
        "query": {"kind": "categorical", "hash_buckets": 16},
        "shop": {"kind": "categorical", "hash_buckets": 8},
        "minutes": {"kind": "numeric", "scale": "log"},
        "price.usd": {"kind": "numeric"},
    },
    "item_features": {"genres": {"kind": "list"}, "weight": {"kind": "numeric"}},
}


def write_log(folder: Path) -> None:
    generator = np.random.default_rng(0)
    events, users, items = 3000, 80, 60
    user = generator.integers(0, users, events)
    item = (user * 7 + generator.integers(0, 12, events)) % items
    log = {
        "user_id": [f"u{one}" for one in user],
        "item_id": [f"i{one:03}" for one in item],
        "timestamp": 1_700_000_000 + np.arange(events) * 60,
        "device": [("phone", "desktop", "tv", None, f"rare {one}")[min(one % 6, 4)] for one in range(events)],
        "query": [f"query {one}" for one in generator.integers(0, 40, events)],
        "shop": generator.integers(-30, 30, events),
        "minutes": generator.exponential(10, events),
        "price.usd": np.where(generator.random(events) < 0.1, np.nan, generator.normal(5, 3, events)),
    }
    (folder / "clicks").mkdir(parents=True)
    pq.write_table(pa.table(log), folder / "clicks" / "part-0.parquet")
    people = {
        "user_id": [f"u{one}" for one in range(users)],
        "country": [("se", "no", None)[one % 3] for one in range(users)],
        "tags": [[f"t{tag}" for tag in range(one % 4)] for one in range(users)],
        "age": generator.normal(40, 10, users),
    }
    pq.write_table(pa.table(people), folder / "users.parquet")
    goods = {
        "item_id": [f"i{one:03}" for one in range(items)],
        "genres": [[f"g{one % 5}", f"g{one % 7}"][: one % 3] for one in range(items)],
        "weight": generator.normal(0, 1, items),
        "title": [None if one == 7 else f"Item {one}" for one in range(items)],
    }
    pq.write_table(pa.table(goods), folder / "items.parquet")


def product_config(folder: Path, name: str, *overrides: str) -> Config:
    """A configuration of a model on the log in `folder`; all models share one prepared dataset."""
    table = {
        "run": {"name": name, "output": str(folder / "runs"), "dataset": str(folder / "dataset")},
        "data": {
            "path": str(folder / "clicks"),
            "users": str(folder / "users.parquet"),
            "items": str(folder / "items.parquet"),
            "shard_events": 1000,
            "negatives": {},
            "columns": {"timestamp": "timestamp", "context": list(_KINDS["context_features"])},
            **_KINDS,
        },
        "model": {"name": name, "dim": 8, "history_length": 10},
        "optim": {"learning_rate": 0.02},
        "training": {"epochs": 1, "global_batch_size": 256},
        "evaluation": {"k": [10], "bootstrap": 0, "baselines": []},
        "retrieval": {"k": 20},
        "scaling": {"num_workers": 0},
    }
    return parse_config(table, overrides)


def make_product_runs(folder: Path, names: Sequence[str] = (*RETRIEVERS, *RANKERS)) -> None:
    """The runs of these models, <folder>/runs/<name>; retrievers have an index."""
    write_log(folder)
    inline_prepare(product_config(folder, "two_tower"))
    for name in names:
        recray.train(product_config(folder, name))
        if name in RETRIEVERS:
            recray.index(product_config(folder, name))
