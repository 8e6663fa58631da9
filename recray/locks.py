"""A lock for a folder that one process at a time may write.

On a file system the kernel releases it when the process ends, however it ends. An object store has leases instead.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import time
from collections.abc import Iterator
from typing import TextIO

from recray import leases, log, storage
from recray.errors import StorageError

# Workers of a driver that was killed live on for some seconds.
_WAIT = 30.0
_POLL = 0.2


@contextlib.contextmanager
def exclusive(uri: str, wait: float = _WAIT) -> Iterator[None]:
    """Let one process at a time into this block for a folder.

    Waits up to `wait` seconds for a process that is in it. Raises StorageError that names the process if it still is.
    """
    if storage.is_remote(uri):
        with leases.lease(uri, wait):
            yield
        return
    path = f"{storage.resolve(uri)[1]}.lock"
    with _locked(uri, path, time.monotonic() + wait):
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            storage.delete_empty_folder(os.path.dirname(path))  # if nothing was made in it


def _locked(uri: str, path: str, deadline: float) -> TextIO:
    """The lock file, open; closing it releases the lock."""
    told = False
    while True:
        with contextlib.suppress(FileNotFoundError):  # its folder was empty and has just been deleted
            try:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                file = open(path, "a+")  # noqa: SIM115
            except OSError as error:
                if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                    raise
                return open(os.devnull)  # nothing can be written there, which the first write reports
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                with file:
                    file.seek(0)
                    holder = file.read().strip()
                # This process would wait for itself.
                if holder == _this_process() or time.monotonic() >= deadline:
                    raise StorageError(
                        f"{uri} is being written by {holder or 'another process'}: wait until that has finished, or "
                        f"choose another run.name"
                    ) from error
                if not told:
                    log.info(
                        "storage", f"waiting for {holder or 'another process'}, which writes {uri}", event="locked"
                    )
                    told = True
                time.sleep(_POLL)
                continue
            except OSError:  # a file system without locks
                return file
            # Its last holder may have deleted it after it was opened here: then another process can lock a new one.
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate(0)
                file.write(_this_process())
                file.flush()
                return file
            file.close()


def _this_process() -> str:
    return f"process {os.getpid()} on {platform.node()}"
