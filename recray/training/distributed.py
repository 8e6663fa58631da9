"""Where the training loop runs: rank, device, data and collectives, with Ray and without.

The loop sees only a `Context`. `LocalContext` is a single process and needs no Ray; `RayContext` is one worker of a
Ray TorchTrainer. All workers call `sum`, `all_gather` and `barrier` equally often and in the same order.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import traceback
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import pyarrow as pa
import torch
from torch import Tensor, nn

from recray import storage
from recray.cluster import cpus, runtime
from recray.config import ScalingConfig
from recray.data.dataset import PreparedDataset
from recray.errors import ResourceError
from recray.layers import collectives, embedding
from recray.loading.sampler import ShardGroup, ShardSlice
from recray.training import fsdp
from recray.training.watchdog import Watchdog

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class Context(Protocol):
    rank: int
    world_size: int
    local_size: int  # workers on this machine
    device: torch.device

    def tables(
        self, dataset: PreparedDataset, shards: list[ShardGroup], slices: list[ShardSlice]
    ) -> Iterator[tuple[ShardSlice, pa.Table]]:
        """The table of every slice's shard, in order; `slice.shard` is an index into `shards`."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all workers."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """Rows of all workers in order of rank; gradients flow back to their worker."""
        ...

    def barrier(self) -> None:
        """Return once all workers have called it."""
        ...

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module on the worker's device, with gradients averaged over workers."""
        ...

    def bounded(self, what: str, first: bool = False) -> AbstractContextManager[None]:
        """Bound the time of a step, in which workers wait for each other. first: of a phase; it may take any time."""
        ...


class LocalContext:
    """A single process."""

    rank = 0
    world_size = 1
    local_size = 1

    def __init__(self, use_gpu: bool = False) -> None:
        self.device = _device(use_gpu)

    def tables(
        self, dataset: PreparedDataset, shards: list[ShardGroup], slices: list[ShardSlice]
    ) -> Iterator[tuple[ShardSlice, pa.Table]]:
        return read_shards(dataset, shards, slices)

    def sum(self, values: Tensor) -> Tensor:
        return values

    def all_gather(self, x: Tensor) -> Tensor:
        return x

    def barrier(self) -> None:
        pass

    def wrap(self, module: nn.Module) -> nn.Module:
        return module.to(self.device)

    def bounded(self, what: str, first: bool = False) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


class RayContext:
    """One worker of a Ray TorchTrainer.

    On several nodes each worker has a Ray Data pipeline, so that nodes without a GPU read for those with one. The
    pipeline spans all remaining epochs in the order of the plan; without a coordinator that assigns shards, no worker
    waits for another one's. The worker reads the first shard itself, since the pipeline takes seconds to start. On a
    single node the worker reads all shards itself, which costs fewer cycles of the same cores.
    """

    def __init__(self, scaling: ScalingConfig, folder: str) -> None:
        """folder: where a worker that hangs says so."""
        import ray.train
        import ray.train.torch

        train = ray.train.get_context()
        self.rank, self.world_size = train.get_world_rank(), train.get_world_size()
        self.local_size = train.get_local_world_size()
        self.device = ray.train.torch.get_device() if scaling.use_gpu else torch.device("cpu")
        self._scaling = scaling
        self.watchdog = Watchdog(scaling.collective_timeout, folder, self.rank)

    def tables(
        self, dataset: PreparedDataset, shards: list[ShardGroup], slices: list[ShardSlice]
    ) -> Iterator[tuple[ShardSlice, pa.Table]]:
        import ray

        nodes = sum(node["Alive"] for node in ray.nodes())
        local = nodes == 1 and "://" not in dataset.uri
        if self._scaling.reader == "worker" or (self._scaling.reader == "auto" and local):
            return read_shards(dataset, shards, slices)
        runtime.quieten_data()
        free = ray.cluster_resources().get("CPU", 1) - self.world_size * self._scaling.cpus_per_worker
        # If the workers hold every CPU, reading requests none: it would wait for a CPU, and the workers for its rows.
        task_cpus = 1 if free >= self.world_size else 0
        return stream_shards(dataset, shards, slices, max(1, int(free) // self.world_size), task_cpus)

    def sum(self, values: Tensor) -> Tensor:
        if self.world_size == 1:
            return values
        moved = values.to(self.device)  # NCCL sums tensors on a GPU only
        torch.distributed.all_reduce(moved)
        return moved.to(values.device)

    def all_gather(self, x: Tensor) -> Tensor:
        return x if self.world_size == 1 else collectives.all_gather(x)

    def barrier(self) -> None:
        # Reading the result blocks until the sum is done; on a GPU the collective alone returns at once.
        float(self.sum(torch.zeros(1, device=self.device)))

    def wrap(self, module: nn.Module) -> nn.Module:
        module = module.to(self.device)
        return module if self.world_size == 1 else data_parallel(module, self._scaling.fsdp)

    def bounded(self, what: str, first: bool = False) -> AbstractContextManager[None]:
        return self.watchdog.bounded(what, first)


def data_parallel(module: nn.Module, fully_sharded: bool = False) -> nn.Module:
    """DDP, or FSDP, around all parameters with dense gradients. `Table.after_backward` exchanges the gradients of the others."""
    outside = embedding.tables(module)
    for table in outside.values():
        if table.mode == "sparse_replicated":
            collectives.from_first(table.weight.data)
    if len(outside) == sum(1 for _ in module.parameters()):
        return module
    if fully_sharded:
        return fsdp.shard(module, [table.weight for table in outside.values()])
    ddp = nn.parallel.DistributedDataParallel
    ddp._set_params_and_buffers_to_ignore_for_model(module, list(outside))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the option's new name exists from torch 2.13 on
        # Buffers are item features: the same on all workers, and as large as the catalogue.
        return ddp(module, broadcast_buffers=False)


def stream_shards(
    dataset: PreparedDataset, shards: list[ShardGroup], slices: list[ShardSlice], cpus: int = 1, task_cpus: int = 1
) -> Iterator[tuple[ShardSlice, pa.Table]]:
    """The table of every slice's shard, in order, read by Ray Data tasks of `task_cpus` (0 or 1) CPUs, on `cpus` CPUs at most."""
    import ray.data

    if not slices:
        return
    options = ray.data.DataContext.get_current().execution_options
    options.preserve_order = True
    options.resource_limits = options.resource_limits.copy(cpu=cpus)
    later = slices[1:]
    uris = [[dataset.file_uri(file) for file in shards[part.shard].files] for part in later]
    rows = [shards[part.shard].rows for part in later]
    if not later:
        yield slices[0], _read(dataset, shards[slices[0].shard])
        return
    work = ray.data.from_items([{"uris": group} for group in uris], override_num_blocks=len(uris))
    # The CPU limit does not hold back tasks that request none: one at a time then.
    read = work.map_batches(
        _read_shard, batch_size=1, batch_format="pyarrow", num_cpus=task_cpus, concurrency=None if task_cpus else 1
    )
    yield slices[0], _read(dataset, shards[slices[0].shard])
    held: list[pa.Table] = []
    at = 0
    # A large shard may arrive in several blocks; preserve_order keeps their order.
    for block in read.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        held.append(block)
        if sum(map(len, held)) == rows[at]:
            yield later[at], pa.concat_tables(held)
            held, at = [], at + 1


def _read_shard(batch: pa.Table) -> pa.Table:
    (uris,) = batch["uris"].to_pylist()
    return pa.concat_tables([storage.read_table(uri) for uri in uris])


def read_shards(
    dataset: PreparedDataset, shards: list[ShardGroup], slices: list[ShardSlice]
) -> Iterator[tuple[ShardSlice, pa.Table]]:
    """The table of every slice's shard, in order, read by this process."""
    for part in slices:
        yield part, _read(dataset, shards[part.shard])


def _read(dataset: PreparedDataset, shard: ShardGroup) -> pa.Table:
    return pa.concat_tables([dataset.read_file(file) for file in shard.files])


def _device(use_gpu: bool) -> torch.device:
    if use_gpu and not torch.cuda.is_available():
        raise ResourceError(
            "scaling.use_gpu = true, but torch finds no GPU here: set scaling.use_gpu = false, or check `nvidia-smi` and that "
            "torch is a CUDA build"
        )
    return torch.device("cuda" if use_gpu else "cpu")


@contextlib.contextmanager
def threads(scaling: ScalingConfig, local_workers: int = 1) -> Iterator[None]:
    """Set the number of torch threads: scaling.threads_per_worker, or this worker's share of the machine's available CPUs.
    With scaling.num_workers = 0 torch's own number is kept, as far as there are CPUs for it."""
    before, found = torch.get_num_threads(), cpus.available()
    share = found // local_workers if scaling.num_workers else min(before, found)
    torch.set_num_threads(scaling.threads_per_worker or max(1, share))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def releasing_ddp() -> Iterator[None]:
    """Free DDP at the end of the block, however it ends, so that the process group can be destroyed after it.

    DDP's reducer holds a reference to the group. If it is the last one, gloo's destructor runs in the reducer's, which
    holds the GIL, and joins a thread that may wait for the GIL: a deadlock (seen with torch 2.13). If the reducer goes
    first, torch.distributed.destroy_process_group drops the last reference, and releases the GIL to do so.
    """
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # the locals of the frames that failed hold DDP
        raise
    finally:
        gc.collect()  # DDP is part of reference cycles


@contextlib.contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Turn off cuDNN attention. On an H100 torch prefers it, and cuDNN builds a plan for every new shape; nearly every
    batch of jagged histories has a new one. Measured: two thirds of the first epoch of SASRec on ml-1m.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def keep_memory() -> None:
    """Tell glibc to keep freed memory for the next step instead of returning it to the kernel, which clears every page
    that it hands out again. Measured: a fifth of a DIN step.

    Tell oneDNN, which torch uses for some matrix products, to cache 16 kernels instead of 1,024, which take 100 MB.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest value that glibc accepts
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
