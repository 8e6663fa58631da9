"""Ranks of a gloo process group, each in its own process, under a time limit.

    def work(rank: int, world_size: int, step: int) -> torch.Tensor: ...

    results = run_ranks(work, 2, 7)  # [work(0, 2, 7), work(1, 2, 7)]

A rank saves its result, waits for the others and ends with `os._exit`: destroying gloo's process group can deadlock in
torch 2.13, when the last reference belongs to DDP's reducer and the main thread, holding the GIL, joins a thread of
gloo's that waits for the GIL. A rank that raises, dies or exceeds the limit fails the test with its traceback, and the
other ranks are killed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recray.layers import collectives
from recray.training.distributed import LocalContext, data_parallel


class RankError(AssertionError):
    """A rank failed; the message holds the tracebacks."""


class RankContext(LocalContext):
    """One rank of a gloo group, without Ray."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size

    def sum(self, values: Tensor) -> Tensor:
        out = values.clone()
        if self.world_size > 1:
            dist.all_reduce(out)
        return out

    def all_gather(self, x: Tensor) -> Tensor:
        return collectives.all_gather(x) if self.world_size > 1 else x

    def barrier(self) -> None:
        self.sum(torch.zeros(1))

    def wrap(self, module: nn.Module) -> nn.Module:
        return data_parallel(module) if self.world_size > 1 else module


class GlooContext:
    """The training context of one rank of `run_ranks`, as far as tests use it."""

    device = torch.device("cpu")

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def sum(self, values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    def bounded(self, what: str, first: bool = False) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


def run_ranks(work: Callable[..., Any], world_size: int, *args: Any, timeout: float = 150.0) -> list[Any]:
    """What `work(rank, world_size, *args)` returns on every rank, in order of rank.

    `work` is a function at the top level of a module (it is pickled by name); what it returns goes through torch.save.
    Raises RankError when a rank raises, dies or has not finished within `timeout` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        spawn = multiprocessing.get_context("spawn")
        processes: list[BaseProcess] = [
            spawn.Process(target=_rank, args=(work, rank, world_size, folder, timeout, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _join(processes, time.monotonic() + timeout)
            failures = _failures(processes, folder)
        finally:
            for process in processes:
                process.kill()  # by its process id; a no-op for one that has ended
                process.join()
        if failures:
            raise RankError("\n".join(failures))
        # Written by the ranks above, and possibly of any type.
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _join(processes: list[BaseProcess], deadline: float) -> None:
    """Wait until all have ended, one has failed or the deadline has passed."""
    while running := [process for process in processes if process.exitcode is None]:
        left = deadline - time.monotonic()
        if left <= 0 or any(process.exitcode for process in processes):
            return
        wait([process.sentinel for process in running], timeout=left)


def _failures(processes: list[BaseProcess], folder: Path) -> list[str]:
    """One text for every rank that failed by itself or, if none did, for every rank that still runs."""
    failed = [rank for rank, process in enumerate(processes) if process.exitcode]
    hanging = [rank for rank, process in enumerate(processes) if process.exitcode is None]
    if not failed and hanging:
        time.sleep(1.5)  # the ranks dump their stacks one second after the deadline
    lines = []
    for rank in failed or hanging:
        code = processes[rank].exitcode
        said = folder / f"{rank}.txt"
        what = "did not finish in time" if code is None else f"exited with {code}"
        lines.append(f"rank {rank} {what}:\n{said.read_text() if said.exists() else ''}")
    return lines


def _rank(
    work: Callable[..., Any], rank: int, world_size: int, folder: Path, timeout: float, args: tuple[Any, ...]
) -> None:
    with open(folder / f"{rank}.txt", "w") as said:
        faulthandler.enable(said)
        faulthandler.dump_traceback_later(timeout + 1, file=said)
        try:
            torch.set_num_threads(1)
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
            )
            torch.save(work(rank, world_size, *args), folder / f"{rank}.pt")
            with contextlib.suppress(RuntimeError):  # the result is on disk: a rank that has left is no failure
                dist.barrier()  # leaving closes connections that the other ranks may still need
        except BaseException:
            traceback.print_exc(file=said)
            said.flush()
            os._exit(1)
        os._exit(0)
