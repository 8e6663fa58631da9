"""Collectives of embedding tables: dense tensors only, which gloo and NCCL both support.

All workers call these in the same order and equally often; a worker that runs alone never calls them. For example,
worker 0 of 2 sends its first row to itself and two rows to worker 1, which sends one row to worker 0 and keeps none:

    worker 0    counts([1, 2]) = [1, 1]    all_to_all([a, b, c], send=[1, 2], receive=[1, 1]) = [a, d]
    worker 1    counts([1, 0]) = [2, 0]    all_to_all([d],       send=[1, 0], receive=[2, 0]) = [b, c]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_to_all(rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
    """The first send[0] rows go to worker 0, the next send[1] to worker 1, and so on. Returns the receive[0] rows of
    worker 0, then the receive[1] rows of worker 1, and so on. No autograd."""
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), receive, send)
    return out


def counts(send: Tensor) -> list[int]:
    """Number of rows that each worker sends here, if this worker sends send[r] rows to worker r."""
    out = torch.empty_like(send)
    dist.all_to_all_single(out, send)
    numbers: list[int] = out.tolist()
    return numbers


def all_gather(rows: Tensor) -> Tensor:
    """Rows of all workers in order of rank; workers may have different numbers of rows. Each worker's rows get the sum
    of the gradients that all workers have for them."""
    out: Tensor = _AllGather.apply(rows)
    return out


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        # The collective needs equal sizes: rows are padded to the largest.
        mine = torch.tensor([len(rows)], device=rows.device)
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(found, mine)
        sizes = [int(one) for one in found]
        begin = sum(sizes[: dist.get_rank()])
        ctx.own = slice(begin, begin + len(rows))
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return total(gradient.contiguous())[ctx.own]


def total(value: Tensor) -> Tensor:
    """Sum over workers."""
    out = value.clone()
    dist.all_reduce(out)
    return out


def from_first(value: Tensor) -> None:
    """Overwrite `value` with that of worker 0."""
    dist.broadcast(value, 0)
