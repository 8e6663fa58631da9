"""The helper that runs ranks: results in order, a failure with its traceback, a limit on time."""

import time

import pytest
import torch
import torch.distributed as dist

from helpers.ranks import RankError, run_ranks


def _sum(rank: int, world_size: int, factor: float) -> torch.Tensor:
    value = torch.tensor([factor * (rank + 1)])
    dist.all_reduce(value)
    return value + rank


def _one_fails(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("no such table")
    dist.barrier()  # would wait for rank 1 until gloo's own limit


def _hangs(rank: int, world_size: int) -> None:
    time.sleep(3600)


def test_results_come_in_order_of_rank() -> None:
    assert [float(value) for value in run_ranks(_sum, 2, 10.0)] == [30.0, 31.0]


def test_a_rank_that_raises_fails_with_its_traceback() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 exited with 1:.*in _one_fails.*ValueError: no such table"):
        run_ranks(_one_fails, 2)


def test_a_rank_that_hangs_is_killed_at_the_limit() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 0 did not finish in time"):
        run_ranks(_hangs, 1, timeout=2)
    assert time.monotonic() - start < 60
