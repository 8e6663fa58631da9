"""Shards of a split shared out to tasks; what they make comes back in order of shards."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track

from recray import runtime
from recray.config import Config

T = TypeVar("T")
_Score = Callable[[Config, str, Iterable[int]], Iterator[T]]


def share_out(score: _Score[T], config: Config, split: str, num_shards: int) -> list[T]:
    """What `score` makes of every shard, in order; in `scaling.num_workers` Ray tasks where that is more than one."""
    workers = min(config.scaling.num_workers, num_shards)
    if workers <= 1:
        shown = sys.stderr.isatty()
        numbers = track(range(num_shards), "evaluate", console=Console(stderr=True), transient=True, disable=not shown)
        return list(score(config, split, numbers))
    import ray

    runtime.start(config.scaling)
    task = ray.remote(_score_share).options(num_cpus=config.scaling.cpus_per_worker)
    shares = ray.get([task.remote(score, config, split, list(range(w, num_shards, workers))) for w in range(workers)])
    return [shares[number % workers][number // workers] for number in range(num_shards)]


def _score_share(score: _Score[Any], config: Config, split: str, numbers: list[int]) -> list[Any]:
    torch.set_num_threads(config.scaling.cpus_per_worker)
    return list(score(config, split, numbers))
