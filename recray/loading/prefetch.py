"""Ready batches for the training loop, made by threads of their own: read -> cut -> copy to the device.

What one thread makes waits in a short queue for the next; all of them end with the feed. Reading (Arrow) and most of
cutting (numpy) leave the interpreter to the thread that trains.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from recray.loading.batch import Batch

T = TypeVar("T")
_Made = tuple[Batch, bool]  # False marks a batch that only pads

_READY = 4  # batches
_TABLES = 1  # one waits, one is being read, one is being cut
_SECONDS_TO_END = 10.0  # a thread that waits for a slow disk or network ends with the process instead


class Prefetcher(Generic[T]):
    """Takes entries from an iterable in a thread, `size` ahead. What fails there is raised where entries are taken."""

    def __init__(self, entries: Iterable[T], size: int) -> None:
        self.waited = 0.0  # seconds that whoever takes entries has waited for one
        self._entries = entries
        self._queue: queue.Queue[T | _End] = queue.Queue(maxsize=size)
        self._stopped = threading.Event()
        self._end: _End | None = None
        self._thread = threading.Thread(target=self._pull, daemon=True, name="recray-ahead")
        self._thread.start()

    def _pull(self) -> None:
        error: BaseException | None = None
        try:
            for entry in self._entries:
                self._queue.put(entry)
                if self._stopped.is_set():
                    break
            # A generator ends in the thread that ran it: what it holds open is closed there.
            close: Callable[[], None] | None = getattr(self._entries, "close", None)
            if close is not None:
                close()
        except BaseException as raised:
            error = raised
        self._queue.put(_End(error))

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        if self._end is None:
            started = time.perf_counter()
            entry = self._queue.get()
            self.waited += time.perf_counter() - started
            if not isinstance(entry, _End):
                return entry
            self._end = entry  # for whoever asks again
        raise StopIteration if self._end.error is None else self._end.error

    def stop(self) -> None:
        """Returns when the thread has ended. Whoever still takes entries finds none."""
        self._stopped.set()
        until = time.monotonic() + _SECONDS_TO_END
        while self._thread.is_alive() and time.monotonic() < until:
            self._drain()  # a full queue holds the thread
            self._thread.join(0.01)
        while True:  # a thread that still lives may fill the queue again
            self._drain()
            with contextlib.suppress(queue.Full):
                return self._queue.put_nowait(_End(None))

    def _drain(self) -> None:
        try:
            while True:
                self._queue.get_nowait()
        except queue.Empty:
            return


@dataclass(frozen=True)
class _End:
    error: BaseException | None


class DeviceLoader:
    """An iterator over batches on the device, cut by `cut` from `tables`. Close it by `with`."""

    def __init__(
        self, tables: Iterator[T], cut: Callable[[Iterator[T]], Iterator[_Made]], device: torch.device
    ) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._cut = self._copied = 0.0
        self._tables = Prefetcher(tables, _TABLES)
        self._batches = Prefetcher(self._moved(cut(self._tables)), _READY)

    def __enter__(self) -> DeviceLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self._tables.stop()
        self._batches.stop()

    def __iter__(self) -> Iterator[_Made]:
        return self

    def __next__(self) -> _Made:
        batch, real, copied = next(self._batches)
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            batch.each(lambda x: _used_on(x, stream))
        return batch, real

    def seconds(self) -> dict[str, float]:
        """So far: what cutting waited for reading, and what cutting and copying took."""
        return {"read": self._tables.waited, "cut": self._cut - self._tables.waited, "copy": self._copied}

    def _moved(self, made: Iterator[_Made]) -> Iterator[tuple[Batch, bool, Any]]:
        while True:
            started = time.perf_counter()
            entry = next(made, None)
            cut = time.perf_counter()
            self._cut += cut - started
            if entry is None:
                return
            batch, real = entry
            copied = None
            if self._stream is not None:
                # From pinned memory and beside the step that runs: the device waits only where the batch is used.
                with torch.cuda.stream(self._stream):
                    batch = batch.each(lambda x: x.pin_memory().to(self._device, non_blocking=True))
                    copied = self._stream.record_event()
            self._copied += time.perf_counter() - cut
            yield batch, real, copied


def _used_on(x: Tensor, stream: Any) -> Tensor:
    """The allocator must not give x's memory away before `stream` is done with it."""
    x.record_stream(stream)
    return x
