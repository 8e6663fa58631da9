"""Where the loop runs: rank, device, data and collectives, with Ray and without.

The loop sees only a Context. LocalContext is one process and needs no Ray;
RayContext is one worker of a Ray TorchTrainer.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import threading
import warnings
from collections.abc import Iterable, Iterator
from typing import Protocol

import pyarrow as pa
import torch
from torch import Tensor, nn

from recray import storage
from recray.config import ScalingConfig
from recray.data.prepared import PreparedDataset
from recray.errors import ResourceError
from recray.plan import ShardGroup, ShardSlice

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class Context(Protocol):
    rank: int
    world_size: int
    device: torch.device

    def tables(
        self, dataset: PreparedDataset, shards: list[ShardGroup], slices: list[ShardSlice]
    ) -> Iterator[tuple[ShardSlice, pa.Table]]:
        """The shard of every slice, in order; a slice's number counts `shards`."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all workers."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """Rows of all workers in order of rank; gradients flow back to their worker."""
        ...

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over workers."""
        ...


class LocalContext:
    """This process alone."""

    rank = 0
    world_size = 1

    def __init__(self, use_gpu: bool = False) -> None:
        self.device = _device(use_gpu)

    def tables(
        self, dataset: PreparedDataset, shards: list[ShardGroup], slices: list[ShardSlice]
    ) -> Iterator[tuple[ShardSlice, pa.Table]]:
        for part in slices:
            yield part, _read(dataset, shards[part.shard])

    def sum(self, values: Tensor) -> Tensor:
        return values

    def all_gather(self, x: Tensor) -> Tensor:
        return x

    def wrap(self, module: nn.Module) -> nn.Module:
        return module.to(self.device)


class RayContext:
    """One worker of a TorchTrainer. Its shards come through a Ray Data pipeline of its own.

    The pipeline runs over all remaining epochs at once, in the order of the plan, so
    that the first shard of an epoch is read while the one before is trained on; and
    no coordinator hands out shards, so no worker can wait for another's. The very first
    shard does not wait for the pipeline, which takes seconds to start.
    """

    def __init__(self, scaling: ScalingConfig) -> None:
        import ray.train
        import ray.train.torch

        train = ray.train.get_context()
        self.rank, self.world_size = train.get_world_rank(), train.get_world_size()
        self.device = ray.train.torch.get_device() if scaling.use_gpu else torch.device("cpu")
        self._scaling = scaling

    def tables(
        self, dataset: PreparedDataset, shards: list[ShardGroup], slices: list[ShardSlice]
    ) -> Iterator[tuple[ShardSlice, pa.Table]]:
        import ray.data

        if not slices:
            return
        context = ray.data.DataContext.get_current()
        options = context.execution_options
        options.preserve_order = True
        free = ray.cluster_resources().get("CPU", 1) - self.world_size * self._scaling.cpus_per_worker
        options.resource_limits = options.resource_limits.copy(cpu=max(1, free // self.world_size))
        # Where the workers hold every CPU, reading asks for none: it would wait for a CPU, and they for its rows.
        cpus = 1 if free >= self.world_size else 0
        later = slices[1:]
        uris = [[dataset.file_uri(file) for file in shards[part.shard].files] for part in later]
        rows = [shards[part.shard].rows for part in later]
        if not later:
            yield slices[0], _read(dataset, shards[slices[0].shard])
            return
        work = ray.data.from_items([{"uris": group} for group in uris], override_num_blocks=len(uris))
        read = work.map_batches(_read_shard, batch_size=1, batch_format="pyarrow", num_cpus=cpus)
        blocks = _Ahead(read.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
        try:
            yield slices[0], _read(dataset, shards[slices[0].shard])
            held: list[pa.Table] = []
            at = 0
            # A large shard may come in several blocks; blocks keep the order.
            for block in blocks:
                held.append(block)
                if sum(map(len, held)) == rows[at]:
                    yield later[at], pa.concat_tables(held)
                    held, at = [], at + 1
        finally:
            blocks.stop()

    def sum(self, values: Tensor) -> Tensor:
        if self.world_size == 1:
            return values
        moved = values.to(self.device)  # NCCL sums what is on the GPU only
        torch.distributed.all_reduce(moved)
        return moved.to(values.device)

    def all_gather(self, x: Tensor) -> Tensor:
        if self.world_size == 1:
            return x
        from torch.distributed.nn.functional import all_gather  # the differentiable one

        sizes = self._sizes(len(x))
        longest = max(sizes)
        padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
        if x.is_floating_point():
            parts = all_gather(padded)  # type: ignore[no-untyped-call]
        else:
            parts = [torch.empty_like(padded) for _ in sizes]
            torch.distributed.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def _sizes(self, size: int) -> list[int]:
        mine = torch.tensor([size], device=self.device)
        sizes = [torch.empty_like(mine) for _ in range(self.world_size)]
        torch.distributed.all_gather(sizes, mine)
        return [int(one) for one in sizes]

    def wrap(self, module: nn.Module) -> nn.Module:
        module = module.to(self.device)
        if self.world_size == 1:
            return module
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the new name of the option is not there before torch 2.13
            # Buffers are item features, the same everywhere and as large as the catalogue.
            return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)


class _Ahead:
    """Takes tables from an iterable in a thread, one ahead; it begins at once."""

    def __init__(self, tables: Iterable[pa.Table]) -> None:
        self._queue: queue.Queue[pa.Table | BaseException | None] = queue.Queue(maxsize=1)
        self._stopped = threading.Event()
        threading.Thread(target=self._pull, args=(tables,), daemon=True).start()

    def _pull(self, tables: Iterable[pa.Table]) -> None:
        try:
            for table in tables:
                self._put(table)
                if self._stopped.is_set():
                    return
            self._put(None)
        except BaseException as error:  # raised again where the tables are taken
            self._put(error)

    def _put(self, entry: pa.Table | BaseException | None) -> None:
        while not self._stopped.is_set():
            try:
                return self._queue.put(entry, timeout=0.5)
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[pa.Table]:
        while (entry := self._queue.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            yield entry

    def stop(self) -> None:
        self._stopped.set()


def _read_shard(batch: pa.Table) -> pa.Table:
    (uris,) = batch["uris"].to_pylist()
    return pa.concat_tables([storage.read_table(uri) for uri in uris])


def _read(dataset: PreparedDataset, shard: ShardGroup) -> pa.Table:
    return pa.concat_tables([storage.read_table(dataset.file_uri(file)) for file in shard.files])


def _device(use_gpu: bool) -> torch.device:
    if use_gpu and not torch.cuda.is_available():
        raise ResourceError(
            "scaling.use_gpu = true, but torch finds no GPU here: set scaling.use_gpu = false, or check `nvidia-smi` and the CUDA build of torch"
        )
    return torch.device("cuda" if use_gpu else "cpu")


def set_threads(workers_here: int) -> None:
    """Share this machine's cores between its workers."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, workers_here)))


def keep_memory() -> None:
    """Have glibc keep what is freed for the next step, instead of giving it back and asking for it again.

    Every page that comes back from the kernel is cleared on its first touch. Measured: a fifth of a DIN step.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
