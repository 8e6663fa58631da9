"""Work on the shards of a split, in this process or in Ray tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

from recray import progress
from recray.cluster import runtime
from recray.cluster.waiting import results
from recray.config import ScalingConfig

T = TypeVar("T")
_Work = Callable[[Iterable[int]], Iterator[T]]


def map_shards(title: str, work: _Work[T], scaling: ScalingConfig, num_shards: int) -> list[T]:
    """The results of `work` for shards 0 to num_shards - 1, in order; in `num_workers` Ray tasks if that is more than one.

    `work` takes the numbers of its shards and yields one result for each, so that it opens models once.
    """
    workers = min(scaling.num_workers, num_shards)
    if workers <= 1:
        return list(work(progress.track(range(num_shards), title, "shards")))
    import ray

    runtime.start(scaling)
    threads = scaling.cpus_per_worker
    task = ray.remote(_run).options(num_cpus=threads)
    refs = [task.remote(work, threads, list(range(w, num_shards, workers))) for w in range(workers)]
    parts = results(refs, title, f"{num_shards:,} shards, tasks")
    return [parts[number % workers][number // workers] for number in range(num_shards)]


def _run(work: _Work[Any], threads: int, numbers: list[int]) -> list[Any]:
    torch.set_num_threads(threads)
    return list(work(numbers))
