"""Work on the shards of a split, in this process or in Ray tasks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track

from recray.cluster import runtime
from recray.config import ScalingConfig

T = TypeVar("T")
_Work = Callable[[Iterable[int]], Iterator[T]]


def map_shards(title: str, work: _Work[T], scaling: ScalingConfig, num_shards: int) -> list[T]:
    """The results of `work` for shards 0 to num_shards - 1, in order; in `num_workers` Ray tasks if that is more than one.

    `work` takes the numbers of its shards and yields one result for each, so that it opens models once.
    """
    workers = min(scaling.num_workers, num_shards)
    if workers <= 1:
        shown = sys.stderr.isatty()
        numbers = track(range(num_shards), title, console=Console(stderr=True), transient=True, disable=not shown)
        return list(work(numbers))
    import ray

    runtime.start(scaling)
    threads = scaling.cpus_per_worker
    task = ray.remote(_run).options(num_cpus=threads)
    parts = ray.get([task.remote(work, threads, list(range(w, num_shards, workers))) for w in range(workers)])
    return [parts[number % workers][number // workers] for number in range(num_shards)]


def _run(work: _Work[Any], threads: int, numbers: list[int]) -> list[Any]:
    torch.set_num_threads(threads)
    return list(work(numbers))
