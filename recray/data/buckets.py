"""Ray tasks over the sorted buckets of a log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from recray.cluster.waiting import results
from recray.data import features, partition

_MERGE = 32  # tables of counts merged by one task


@dataclass(frozen=True)
class Buckets:
    """The files of sorted events in a folder."""

    folder: str
    numbers: list[int]

    def each(
        self, function: Callable[..., Any], *args: Any, offsets: list[int] | None = None, num_returns: int = 1
    ) -> list[Any]:
        """`function` on every bucket, as Ray tasks; their references in order of buckets."""
        import ray

        task = ray.remote(function).options(num_returns=num_returns)
        extra = [()] * len(self.numbers) if offsets is None else [(offset,) for offset in offsets]
        return [
            task.remote(partition.sorted_file(self.folder, number), number, *args, *more)
            for number, more in zip(self.numbers, extra, strict=False)
        ]


def get(refs: list[Any], title: str) -> list[dict[str, Any]]:
    """Results of tasks, with progress under this title. If one fails, the others are stopped, so that nothing is written after the error."""
    import ray

    try:
        return results(refs, "prepare", title)
    except BaseException:
        # Other tasks often fail for the same reason at the same time, and Ray 2.60 aborts this process if a task ends
        # while it is being cancelled ("Tried to complete task that was not pending"). So wait for them first.
        _, left = ray.wait(refs, num_returns=len(refs), timeout=2)
        for ref in left:
            ray.cancel(ref)
        ray.wait(refs, num_returns=len(refs), timeout=30)
        raise


def merge(refs: list[Any]) -> pa.Table:
    """Counts of all buckets as one table, by a tree of tasks."""
    import ray

    task = ray.remote(features.merge)
    while len(refs) > _MERGE:
        refs = [task.remote(*refs[i : i + _MERGE]) for i in range(0, len(refs), _MERGE)]
    return ray.get(task.remote(*refs))
