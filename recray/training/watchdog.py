"""End a worker whose step takes too long, so that a worker that hangs does not hold the others for ever.

    watchdog = Watchdog(120.0, folder, rank)
    for ...:
        with watchdog.bounded("step 7 of epoch 2"):
            ...                            # the next batch, forward, backward, collectives

Workers meet in every step, so one that hangs (a file system that does not answer, a deadlock in a model) stops all of them.
A thread looks at the step that runs. If it exceeds the limit, the thread writes who hangs, and where, into the training's
folder and ends the process; the driver reads that (`stalled`) and starts the workers again. A worker that waits for the
others is given longer, and writes nothing, so that the one that they wait for is named.

A worker that is stopped, or that the network has lost, cannot report anything. It does not answer Ray Train's health check
either, which has the same limit.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from recray import log, storage

_FIRST = "stalled"  # names of the files that workers leave
_GRACE = 30.0  # seconds that a worker waits longer if it is the others that do not come
_WRITE = 10.0  # seconds for the file; it may be the storage that hangs
_SLOW = 10  # steps may be slow: the limit is at least so many times the longest one
_WAITING = ("torch/distributed/", "torch/nn/parallel/", "torch/autograd/", "recray/layers/collectives.py")


class Watchdog:
    """Bounds the steps of one worker.

    timeout: seconds of a step; steps that take longer all the time raise the limit.
    """

    def __init__(self, timeout: float, folder: str, rank: int, end: Callable[[int], None] = os._exit) -> None:
        self._timeout, self._folder, self._rank, self._end = timeout, folder, rank, end
        self._longest = 0.0  # seconds of a step so far
        self._step: tuple[str, float] | None = None  # what is bounded now, and since when
        self._thread = threading.get_ident()  # of the training loop
        self._stop = threading.Event()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the steps of the thread that enters this block."""
        self._thread = threading.get_ident()
        looking = threading.Thread(target=self._look, name="recray-watchdog", daemon=True)
        looking.start()
        try:
            yield
        finally:
            self._stop.set()
            looking.join()

    @contextlib.contextmanager
    def bounded(self, what: str, first: bool = False) -> Iterator[None]:
        """Bound the step in the block. The first one of a phase has no limit: it may compile, and waits for its batch."""
        started = time.monotonic()
        self._step = None if first else (what, started)
        try:
            yield
        finally:
            self._step = None
        self._longest = max(self._longest, time.monotonic() - started)

    def _look(self) -> None:
        while not self._stop.wait(min(1.0, self._timeout / 4)):
            step = self._step
            if step is None:
                continue
            seconds = time.monotonic() - step[1]
            limit = max(self._timeout, _SLOW * self._longest)
            frame = sys._current_frames().get(self._thread)
            waits = frame is not None and any(part in frame.f_code.co_filename for part in _WAITING)
            if seconds <= limit + (_GRACE if waits else 0.0) or self._step is not step:
                continue
            does = "waits for the other workers" if waits else "does not come"
            who = f"worker {self._rank} on {platform.node()}"
            message = f"{who} {does}: {step[0]} has taken {seconds:.0f} s, at {_at(frame)}"
            log.warning("train", message, event="stalled")
            if not waits:
                self._write(message)
            self._end(1)
            return

    def _write(self, message: str) -> None:
        uri = storage.join(self._folder, f"{_FIRST}-{self._rank:05d}")
        writing = threading.Thread(target=storage.write_bytes, args=(uri, message.encode()), daemon=True)
        writing.start()
        writing.join(_WRITE)


def stalled(folder: str) -> str:
    """What workers that ended themselves have left in the training's folder, which is deleted; empty if none did."""
    found = []
    for info in storage.list_files(folder, "") if storage.exists(folder) else []:
        if info.uri.rpartition("/")[2].startswith(f"{_FIRST}-"):
            found.append(storage.read_bytes(info.uri).decode())
            storage.delete_file(info.uri)
    return "; ".join(sorted(found))


def _at(frame: FrameType | None) -> str:
    """The innermost line of the training loop's thread."""
    return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})" if frame else "an unknown line"
