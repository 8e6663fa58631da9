"""What tables send between workers: dense collectives only, so that gloo and NCCL run them alike.

All workers call these in the same order, as many times. One worker alone never calls them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_to_all(rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
    """send[r] rows, in order, go to worker r, which sends receive[r] rows back in the same order."""
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), receive, send)
    return out


def counts(send: Tensor) -> list[int]:
    """How many rows every worker sends here, when send[r] go from here to worker r."""
    out = torch.empty_like(send)
    dist.all_to_all_single(out, send)
    return out.tolist()  # type: ignore[no-any-return]


def all_gather(rows: Tensor) -> Tensor:
    """Rows of all workers in order of rank, however many each has; gradients flow back to their worker."""
    return _AllGather.apply(rows)  # type: ignore[no-any-return, no-untyped-call]


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:  # type: ignore[override]
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
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return total(gradient.contiguous())[ctx.own]


def total(value: Tensor) -> Tensor:
    """Sum over workers."""
    out = value.clone()
    dist.all_reduce(out)
    return out


def from_first(value: Tensor) -> None:
    """Fill `value` with that of worker 0."""
    dist.broadcast(value, 0)
