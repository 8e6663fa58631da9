"""Work on all cores by threads that run torch on one core each.

Within an operation torch has all cores meet at its end, which for small operations in a row costs about as much as the
second core brings. Threads that go through separate parts of the work never wait for each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def map_parts(function: Callable[[Sequence[T]], R], entries: Sequence[T]) -> list[R]:
    """The function of every n-th entry, for each of the n cores that torch has here. Gradients are not recorded."""
    cores = min(torch.get_num_threads(), len(entries))
    if cores <= 1:
        return [function(entries)]

    inference = torch.is_inference_mode_enabled()  # a thread's own setting, as is no_grad

    def part(core: int) -> R:
        with torch.no_grad(), torch.inference_mode(inference):
            return function(entries[core::cores])

    return list(_pool(torch.get_num_threads()).map(part, range(cores)))


@lru_cache(maxsize=1)
def _pool(cores: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(cores, thread_name_prefix="recray-core")
    together = threading.Barrier(cores)

    def begin(_: int) -> None:
        torch.set_num_threads(1)
        together.wait()  # so that each task has a thread of its own

    list(pool.map(begin, range(cores)))
    torch.set_num_threads(cores)  # what the threads asked for is also what later threads would begin with
    return pool
