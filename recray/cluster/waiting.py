"""Waiting for Ray tasks, with progress."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recray import progress


def results(refs: Sequence[Any], stage: str, title: str) -> list[Any]:
    """As `ray.get(refs)`, which it calls in the end; shows how many tasks are done."""
    import ray

    left = list(refs)
    with progress.task(stage, title, len(left)) as task:
        while left:
            done, left = ray.wait(left, num_returns=1, fetch_local=False)
            task.update(len(done))
            try:
                ray.get(done)
            except Exception:
                left = []  # the call below raises what it would have raised alone
        return list(ray.get(refs))
