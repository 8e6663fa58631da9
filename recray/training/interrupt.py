"""Stop training at a step boundary: by SIGTERM, by Ctrl-C, or by a file that the driver leaves for its workers.

    with interrupt.graceful():      # the command line does this
        recray.train(config)        # raises Interrupted once the state is on disk
        recray.prepare(config)      # ends with SystemExit or KeyboardInterrupt, as every stage but training does

A process that trains by itself looks for a signal after every step. Ray workers run on other machines, so the driver's
signal handler writes a file into the checkpoint's folder, which worker 0 looks for every few seconds.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from recray import log, storage

_FILE = "stop"
_LOOK_EVERY = 2.0  # seconds
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_graceful = False  # inside of `graceful`
_training = False  # inside of `polled` or `forwarded`
_folder: str | None = None  # of the training whose workers this process drives
_received: signal.Signals | None = None
_ends: signal.Signals | None = None  # the signal that ends this process without saving


@contextlib.contextmanager
def graceful() -> Iterator[None]:
    """Inside the block the first SIGTERM or SIGINT asks training to save and stop; a second one stops at once.

    Outside of training the first one stops at once, and what is half written is deleted on the way out. The block then
    raises KeyboardInterrupt for SIGINT and SystemExit(143) for SIGTERM, whatever exception the signal became on its way.
    """
    global _graceful, _received, _ends
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    _graceful = True
    _handle()
    try:
        yield
    except BaseException:
        if _ends == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM) from None
        if _ends == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise
    finally:
        _graceful, _received, _ends = False, None, None
        for number, handler in before.items():
            signal.signal(number, handler)


def is_graceful() -> bool:
    """Whether this is inside of `graceful`."""
    return _graceful


@contextlib.contextmanager
def polled() -> Iterator[None]:
    """Inside the block this process trains, and asks `received()` after every step."""
    with _handled(None):
        yield


@contextlib.contextmanager
def forwarded(folder: str) -> Iterator[None]:
    """Inside the block the Ray workers that train in `folder` are told of signals."""
    storage.delete_file(storage.join(folder, _FILE))
    try:
        with _handled(folder):
            yield
    finally:
        storage.delete_file(storage.join(folder, _FILE))


@contextlib.contextmanager
def _handled(folder: str | None) -> Iterator[None]:
    global _training, _folder
    _training, _folder = True, folder
    if _graceful:  # again: Ray may have replaced the handlers
        _handle()
    try:
        yield
    finally:
        _training, _folder = False, None


def _handle() -> None:
    for number in _SIGNALS:
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    global _received, _ends
    if not _training or _received is not None:
        _ends = signal.Signals(number)
        # For SIGTERM, too: Ray passes on this exception from within its waits, and turns SystemExit into an error of its own.
        raise KeyboardInterrupt
    _received = signal.Signals(number)
    log.warning("train", f"{_received.name}: saving, then stopping (once more: stops at once)", event="stopping")
    if _folder is not None:
        request(_folder, _received.name)


def request(folder: str, reason: str) -> None:
    """Ask the Ray workers that train in `folder` to save and stop."""
    storage.write_bytes(storage.join(folder, _FILE), reason.encode())


def received() -> signal.Signals | None:
    """The signal that asks training in this process to stop."""
    return _received


class StopRequest:
    """Whether training was asked to stop.

    folder: where the driver of Ray workers leaves its file, which worker 0 looks for; None in a process that trains itself.
    """

    def __init__(self, folder: str | None, rank: int = 0) -> None:
        self._folder, self._rank, self._looked = folder, rank, time.monotonic()

    def __call__(self) -> bool:
        if self._folder is None:
            return received() is not None
        if self._rank or time.monotonic() - self._looked < _LOOK_EVERY:
            return False
        self._looked = time.monotonic()
        return storage.exists(storage.join(self._folder, _FILE))
