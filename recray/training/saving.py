"""Save the training state while training continues.

    saver = Saver(state, context, phase, "10m", complete)
    for ...:
        ...                            # a step; all workers sum `saver.flags()` with what else they exchange
        saver.after_step(flags)

At a step boundary every worker copies its part of the state to host memory; that is all that training waits for. A thread
writes the copy, at most one at a time. When all workers have written their part, worker 0 writes the record, which makes
the folder one to resume from. Workers never wait for each other here: that they have written, and that worker 0's clock
says it is time, travels with the sum of weights that they exchange in every step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recray import sealed, storage
from recray.data.split import duration
from recray.digests import FileDigest
from recray.errors import StorageError
from recray.records import CheckpointRecord
from recray.training.distributed import Context
from recray.training.phase import Phase
from recray.training.state import Snapshot, TrainState

Describe = Callable[[], CheckpointRecord]
Complete = Callable[[str, CheckpointRecord, dict[str, FileDigest]], None]


class Flags(NamedTuple):
    """What workers tell each other in a step; summed over them."""

    due: float  # worker 0: it is time to save
    stop: float  # this worker was asked to stop
    written: float  # this worker's part of the save in progress is on disk


class Saver:
    """Saves the state of one phase between the ends of its epochs.

    every: training.save_every: a duration, a number of steps ("500 steps"), or "" for never.
    describe: the record of the state, taken with the copy: training has moved on when the record is written.
    complete: called on worker 0 once all parts are in a folder, with the digests of its files; writes the record.
    """

    def __init__(
        self, state: TrainState, context: Context, phase: Phase, every: str, describe: Describe, complete: Complete
    ) -> None:
        self._state, self._context, self._phase = state, context, phase
        self._describe, self._complete = describe, complete
        self._steps, self._seconds = _interval(every)
        self._saved_at, self._saved_step = time.monotonic(), state.progress.step
        self._buffers: dict[str, Tensor] = {}
        self._write: _Write | None = None
        self.blocked = 0.0  # seconds that training waited for copies, and for a write that was still running

    def flags(self, stop: bool) -> Flags:
        """This worker's flags of the current step."""
        write = self._write
        written = write is not None and write.done()
        if write is not None and written:
            write.raise_error()
        due = self._context.rank == 0 and (write is None or written) and self._is_due()
        return Flags(float(due), float(stop), float(written))

    def after_step(self, flags: Flags) -> None:
        """At the end of a step, with the sums of all workers' flags."""
        if flags.written == self._context.world_size:
            self._complete_write()
        if flags.due or flags.stop:
            started = time.perf_counter()
            self.wait()
            progress = self._state.progress
            folder = self._phase.folder(progress.epoch, progress.sums.steps)
            self._write = _Write(self._copy(self._state.snapshot(self._context)), folder, self._describe())
            self.restart_clock()
            if flags.stop:
                self.wait()
            self.blocked += time.perf_counter() - started

    def wait(self) -> None:
        """Wait for the write in progress. Raises its error, on all workers, if one of them could not write."""
        if self._write is None:
            return
        self._write.thread.join()
        failed = self._write.error is not None
        if float(self._context.sum(torch.tensor([float(failed)]))):
            self._write.raise_error()
            raise StorageError(f"{self._write.folder}: another worker could not write its part")
        self._complete_write()
        self._context.barrier()

    def restart_clock(self) -> None:
        """The state was saved otherwise."""
        self._saved_at, self._saved_step = time.monotonic(), self._state.progress.step

    def take_blocked(self) -> float:
        """Seconds that training waited for saving, since the last call."""
        blocked, self.blocked = self.blocked, 0.0
        return blocked

    def _is_due(self) -> bool:
        if self._steps:
            return self._state.progress.step - self._saved_step >= self._steps
        return self._seconds > 0 and time.monotonic() - self._saved_at >= self._seconds

    def _complete_write(self) -> None:
        """All workers have written their part."""
        write, self._write = self._write, None
        if write is not None and self._context.rank == 0:
            self._complete(write.folder, write.record, digests(write.folder, write.files, self._context.world_size))

    def _copy(self, snapshot: Snapshot) -> Snapshot:
        """With copies of all tensors in host memory, which the next save reuses."""
        fields = ("weights", "body", "tables")
        copied = {name: self._copied(getattr(snapshot, name), name) for name in fields}
        if self._context.device.type == "cuda":
            torch.cuda.current_stream(self._context.device).synchronize()
        return Snapshot(**copied, rank=snapshot.rank, world_size=snapshot.world_size)

    def _copied(self, value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return {key: self._copied(one, f"{path}/{key}") for key, one in value.items()}
        if isinstance(value, list):
            return [self._copied(one, f"{path}/{number}") for number, one in enumerate(value)]
        if not isinstance(value, Tensor):
            return value
        buffer = self._buffers.get(path)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            # Copies from a GPU to pinned memory do not go through another buffer.
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._buffers[path] = buffer
        return buffer.copy_(value.detach(), non_blocking=value.is_cuda)


class _Write:
    """One worker's part on its way to disk."""

    def __init__(self, snapshot: Snapshot, folder: str, record: CheckpointRecord) -> None:
        self.folder, self.record = folder, record
        self.files: dict[str, FileDigest] = {}
        self._snapshot = snapshot
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="recray-save", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.files = self._snapshot.write(self.folder)
        except BaseException as error:  # raised in the training loop
            self.error = error

    def done(self) -> bool:
        return not self.thread.is_alive()

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error


def digests(folder: str, own: dict[str, FileDigest], world_size: int) -> dict[str, FileDigest]:
    """Digests of all workers' files: those of the other workers are in files that they wrote."""
    found = dict(own)
    for rank in range(1, world_size):
        uri = storage.join(folder, Snapshot.digest_file(rank))
        if storage.exists(uri):
            found |= {name: FileDigest.model_validate(one) for name, one in sealed.read(uri, "train again").items()}
    return found


def _interval(every: str) -> tuple[int, float]:
    """Steps and seconds between saves; 0 for the one that does not apply."""
    if every.endswith(" steps"):
        return int(every.removesuffix(" steps")), 0.0
    return 0, duration(every) / 1e6 if every else 0.0
