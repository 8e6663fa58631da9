"""Shards of a split shared out to tasks; what they make comes back in order of shards."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track

from recray.cluster import runtime
from recray.config import Config

T = TypeVar("T")
_Work = Callable[[Iterable[int]], Iterator[T]]


def map_shards(title: str, work: _Work[T], config: Config, num_shards: int) -> list[T]:
    """What `work` makes of every shard, in order; in `scaling.num_workers` Ray tasks where that is more than one."""
    workers = min(config.scaling.num_workers, num_shards)
    if workers <= 1:
        shown = sys.stderr.isatty()
        numbers = track(range(num_shards), title, console=Console(stderr=True), transient=True, disable=not shown)
        return list(work(numbers))
    import ray

    runtime.start(config.scaling)
    threads = config.scaling.cpus_per_worker
    task = ray.remote(_share).options(num_cpus=threads)
    shares = ray.get([task.remote(work, threads, list(range(w, num_shards, workers))) for w in range(workers)])
    return [shares[number % workers][number // workers] for number in range(num_shards)]


def _share(work: _Work[Any], threads: int, numbers: list[int]) -> list[Any]:
    torch.set_num_threads(threads)
    return list(work(numbers))
