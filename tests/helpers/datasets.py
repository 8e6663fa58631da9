"""A prepared dataset of a few users, written without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from recray import storage
from recray.data.dataset import PreparedDataset
from recray.records import DatasetRecord, Shard

USERS, ITEMS, EVENTS = 12, 20, 8


SECOND = 1_000_000  # in microseconds, the unit of times


def user_rows(users: range, targets: int, labelled: bool, timed: bool = False) -> pa.Table:
    generator = np.random.default_rng(0)
    columns: dict[str, Any] = {
        "user": pa.array(np.array([2 + user for user in users], np.int32)),
        "item": pa.array([generator.integers(2, ITEMS, EVENTS) for _ in users], pa.list_(pa.int32())),
        "time": pa.array([np.arange(EVENTS) * (SECOND if timed else 1) for _ in users], pa.list_(pa.int64())),
        "num_targets": pa.array([targets] * len(users), pa.int32()),
    }
    if labelled:
        columns["label"] = pa.array([np.arange(EVENTS) % 2 for _ in users], pa.list_(pa.float32()))
    return pa.table(columns)


def small_dataset(
    folder: Path, valid_users: int = USERS, train_users: int = USERS, labelled: bool = False, timed: bool = False
) -> PreparedDataset:
    """timed: events are a second apart, and training ends with second 8; otherwise times are positions."""
    shards = {}
    for split, users, targets in (("train", train_users, EVENTS - 2), ("valid", valid_users, 2)):
        storage.write_table(str(folder / split / "part.parquet"), user_rows(range(users), targets, labelled, timed))
        events = users * targets
        shards[split] = [Shard(file=f"{split}/part.parquet", rows=users, events=events, impressions=events)]
    counts = pa.array(np.r_[0, 0, np.ones(ITEMS - 2)].astype(np.int64))
    storage.write_table(str(folder / "items.parquet"), pa.table({"item": pa.array(range(ITEMS)), "count": counts}))
    DatasetRecord(
        **{"fingerprint": "", "num_items": ITEMS, "num_users": USERS + 2, "counts": {}, "seed": 0, "shards": shards},  # type: ignore[arg-type]
        columns={"label": "list<float>"} if labelled else {},
        has_time=timed,
        split={"last": EVENTS * SECOND},
    ).write(str(folder))
    return PreparedDataset.open(str(folder))
