"""A lease on a place in an object store, which has no locks: one process at a time writes there.

The lease is an object that its holder writes again every few seconds. Another process that finds it watches it: a lease that
changes is in use, one that does not change for half a minute belongs to a process that has died. No clock of another machine
is compared with one's own.

pyarrow has no conditional PUT, so a process writes its name, waits, and looks whose name is there. Should two still hold the
lease, for example since one was stopped for minutes, the one whose name is no longer there writes no record any more:
`check` is asked before each.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from recray import log, storage
from recray.errors import StorageError

_RENEW = 10.0  # seconds
_DEAD = 30.0  # seconds without a renewal
_SETTLE = 1.0  # seconds until the name that is there is that of the holder
_POLL = 1.0

_lost: dict[str, str] = {}  # place -> who has it now


@contextlib.contextmanager
def lease(uri: str, wait: float) -> Iterator[None]:
    """Hold the lease of `uri` inside the block.

    Waits up to `wait` seconds for another holder. Raises StorageError that names it if it still writes there.
    """
    path, mine = f"{uri}.lock", {"holder": f"process {os.getpid()} on {platform.node()}", "token": uuid.uuid4().hex}
    _acquire(uri, path, mine, wait)
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(uri, path, mine, ended), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        if _lost.pop(uri, None) is None:
            storage.delete_file(path)


def check() -> None:
    """Raise StorageError if another process took over a place that this process writes to."""
    for uri, holder in _lost.items():
        raise StorageError(
            f"{uri} was taken over by {holder} while this process did not answer for {_DEAD:g} s: nothing more is written "
            "here; look at what that process makes"
        )


def _acquire(uri: str, path: str, mine: dict[str, str], wait: float) -> None:
    seen, told = _read(path), False
    began = changed = time.monotonic()
    while True:
        if seen is None or _ended_here(seen) or time.monotonic() - changed >= _DEAD:
            storage.write_json(path, {**mine, "renewed": 0})
            time.sleep(_SETTLE)
            seen = _read(path)
            if seen is not None and seen["token"] == mine["token"]:
                return
            changed = time.monotonic()
            continue
        alive = changed != began and time.monotonic() - began >= wait
        if alive or seen["holder"] == mine["holder"]:  # this process would wait for itself
            raise StorageError(
                f"{uri} is being written by {seen['holder']}: wait until that has finished, or choose another run.name"
            )
        if not told:
            log.info("storage", f"waiting for {seen['holder']}, which writes {uri}", event="locked")
            told = True
        time.sleep(_POLL)
        before, seen = seen, _read(path)
        if seen != before:
            changed = time.monotonic()


def _renew(uri: str, path: str, mine: dict[str, str], ended: threading.Event) -> None:
    renewed = 0
    while not ended.wait(_RENEW):
        with contextlib.suppress(StorageError):  # the store does not answer: try again
            found = _read(path)
            if found is not None and found["token"] != mine["token"]:
                _lost[uri] = found["holder"]
                log.warning("storage", f"{found['holder']} has taken over {uri}", event="lease_lost")
                return
            renewed += 1
            storage.write_json(path, {**mine, "renewed": renewed})


def _read(path: str) -> dict[str, Any] | None:
    """None where nobody holds the lease."""
    if not storage.exists(path):
        return None
    try:
        body = storage.read_json(path)
    except StorageError:
        if not storage.exists(path):
            return None  # it was released in the meantime
        raise
    return body if isinstance(body, dict) and {"holder", "token"} <= body.keys() else None


def _ended_here(body: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is gone."""
    pid, _, host = str(body["holder"]).removeprefix("process ").partition(" on ")
    if host != platform.node() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
