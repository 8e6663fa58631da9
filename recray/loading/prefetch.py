"""Batches made ahead of the training loop by background threads: read -> cut -> copy to the device.

    with DeviceLoader(tables, cut, device) as batches:
        for batch, real in batches: ...

One thread reads tables, one cuts them into batches and copies those to the device; a short queue after each bounds the
memory. Reading (Arrow) and most of cutting (numpy) release the GIL, so that they run next to the training step.
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
_Made = tuple[Batch, bool]  # False marks a padding batch

_READY = 4  # batches
_TABLES = 1  # one is ready while one is read and one is cut
_SECONDS_TO_STOP = 10.0  # a thread that a slow disk or network blocks for longer is left to end with the process


class Prefetcher(Generic[T]):
    """Prefetches up to `size` items in a background thread, and re-raises its exceptions in the consumer."""

    def __init__(self, entries: Iterable[T], size: int) -> None:
        self.waited = 0.0  # seconds that the consumer waited for items
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
            # A generator must be closed in the thread that runs it, to release the files and streams that it holds.
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
            self._end = entry  # kept, so that later calls end or fail the same way
        raise StopIteration if self._end.error is None else self._end.error

    def stop(self) -> None:
        """Stop the thread and wait for it, for a limited time. A consumer that still iterates gets no more items."""
        self._stopped.set()
        until = time.monotonic() + _SECONDS_TO_STOP
        while self._thread.is_alive() and time.monotonic() < until:
            self._drain()  # a full queue blocks the thread
            self._thread.join(0.01)
        while True:  # a thread that was not waited for may fill the queue again
            self._drain()
            with contextlib.suppress(queue.Full):
                return self._queue.put_nowait(_End(None))

    def _drain(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()


@dataclass(frozen=True)
class _End:
    error: BaseException | None


class DeviceLoader:
    """Iterates over (batch on the device, False if it is padding). Use it in a `with` block, which stops its threads."""

    def __init__(
        self, tables: Iterator[T], cut: Callable[[Iterator[T]], Iterator[_Made]], device: torch.device
    ) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
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
        """Since the start: "read", how long cutting waited for tables; "cut" and "copy", how long those took."""
        return {"read": self._tables.waited, "cut": self._cut - self._tables.waited, "copy": self._copied}

    def _moved(self, made: Iterator[_Made]) -> Iterator[tuple[Batch, bool, Any]]:
        """Batches on the device, each with the event that its copy is done (None on a CPU)."""
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
                # From pinned memory on a stream of its own, the copy runs during the current step. The training stream
                # waits for it only when it uses the batch.
                with torch.cuda.stream(self._stream):
                    batch = batch.each(lambda x: x.pin_memory().to(self._device, non_blocking=True))
                    copied = self._stream.record_event()
            self._copied += time.perf_counter() - cut
            yield batch, real, copied


def _used_on(x: Tensor, stream: Any) -> Tensor:
    """Keep the caching allocator from reusing the memory of x before `stream` is done with it."""
    x.record_stream(stream)
    return x
