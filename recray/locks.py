"""A lock for a folder that one process at a time may write. The kernel releases it when the process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
from collections.abc import Iterator
from typing import TextIO

from recray import storage
from recray.errors import StorageError


@contextlib.contextmanager
def exclusive(uri: str) -> Iterator[None]:
    """Let one process at a time into this block for a local folder; an object store has no locks.

    Raises StorageError that names the process that is in it.
    """
    if "://" in uri and not uri.startswith("file://"):
        yield
        return
    path = f"{storage.resolve(uri)[1]}.lock"
    with _locked(uri, path):
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    storage.delete_empty_folder(os.path.dirname(path))  # if nothing was made in it


def _locked(uri: str, path: str) -> TextIO:
    """The lock file, open; closing it releases the lock."""
    while True:
        with contextlib.suppress(FileNotFoundError):  # its folder was empty and has just been deleted
            os.makedirs(os.path.dirname(path), exist_ok=True)
            file = open(path, "a+")  # noqa: SIM115
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise StorageError(
                    f"{uri} is being written by {holder}: wait until that has finished, or choose another run.name"
                ) from error
            except OSError:  # a file system without locks
                return file
            # Its last holder may have deleted it after it was opened here: then another process can lock a new one.
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}")
                file.flush()
                return file
            file.close()
