"""A complete run of a small two-tower model in this process: dataset, checkpoint, index, report and lists, in seconds."""

from __future__ import annotations

from pathlib import Path

import recray
from helpers.configs import simulated_table
from helpers.inline_tasks import inline_prepare
from recray.config import Config, parse_config


def small_config(output: Path, *overrides: str) -> Config:
    table = simulated_table(
        output,
        events=2000,
        users=60,
        items=50,
        data={"shard_events": 1000},
        model={"name": "two_tower", "dim": 8},
        training={"epochs": 2, "global_batch_size": 256},
        evaluation={"k": [10], "bootstrap": 0, "baselines": ["popularity"]},
        scaling={"num_workers": 0},
    )
    return parse_config(table, overrides)


def make_run(config: Config) -> None:
    """All stages, and the lists of all users in <output>/lists."""
    inline_prepare(config)
    recray.train(config)
    recray.index(config)
    recray.evaluate(config)
    recray.recommend(config, f"{config.run.output}/lists", k=5)
