"""A log that grows by a file a day, with new items and users every day, and a configuration that follows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recray.config import Config, parse_config

DAY = 86_400_000_000  # microseconds
START = 1_700_006_400_000_000  # midnight
EVENTS, USERS = 1_500, 80  # a day


def write_day(folder: Path, day: int) -> None:
    """Events of one day. Neighbouring items are chosen together, and the catalogue moves by five items a day."""
    generator = np.random.default_rng(day)
    user = generator.integers(0, USERS + 10 * day, EVENTS)
    item = 5 * day + (user * 7 + generator.integers(0, 6, EVENTS)) % 40
    table = {
        "user_id": [f"u{one}" for one in user],
        "item_id": [f"i{one:03}" for one in item],
        "timestamp": START + day * DAY + np.sort(generator.integers(0, DAY, EVENTS)),
        "device": [("phone", "desktop", f"day{day}")[one] for one in generator.integers(0, 3, EVENTS)],
        "minutes": generator.exponential(10 + day, EVENTS),
    }
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), folder / f"day-{day}.parquet")


def growing_config(folder: Path, *overrides: str) -> Config:
    """A two-tower model on the events in folder/clicks; the last 12 hours are the test, the 12 before them validation."""
    table = {
        "run": {"name": "nightly", "output": str(folder / "runs")},
        "data": {
            "path": str(folder / "clicks"),
            "timestamp_unit": "us",
            "shard_events": 2_000,
            "columns": {"timestamp": "timestamp", "context": ["device", "minutes"]},
            "context_features": {"device": {"kind": "categorical"}, "minutes": {"kind": "numeric"}},
            "split": {"kind": "temporal", "valid": "12h", "test": "12h"},
        },
        "model": {"name": "two_tower", "dim": 8},
        "optim": {"learning_rate": 0.02},
        "training": {"epochs": 3, "global_batch_size": 128},
        "evaluation": {"k": [10], "queries": "event", "filter_seen": False, "bootstrap": 100, "baselines": []},
        "promotion": {"baselines": ["popularity"], "margin": 0.1},
        "scaling": {"num_workers": 0},
    }
    return parse_config(table, overrides)
