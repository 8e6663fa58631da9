"""Sizes and hashes of files: of recray's own, which records name, and of input files."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from builtins import bytes as Data
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from recray import folders, storage
from recray.errors import StorageError
from recray.storage import FileInfo

_THREADS = 16
_HASHED_BYTES = 4 << 30  # local inputs up to this size are hashed whole: about a second per GB and core


def inside(name: str) -> str:
    """`name`, a path below a folder. Raises ValueError for one that leads elsewhere: absolute, a URI, or with `..`."""
    if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name or not name.isprintable():
        raise ValueError("is no path below the folder of its record")
    return name


Inside = Annotated[str, AfterValidator(inside)]


class FileDigest(BaseModel):
    """Size and hash of a file, by which a damaged one is recognized."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str

    @staticmethod
    def of(data: Data) -> FileDigest:
        return FileDigest(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    def check(self, uri: str) -> None:
        """Raises StorageError if the file at `uri` is missing, or is not the one that was written."""
        self._compare(uri, *storage.digest(uri))

    def read(self, uri: str) -> Data:
        """The bytes of the file at `uri`. Raises StorageError if they are not those that were written."""
        data = storage.read_bytes(uri)
        self._compare(uri, len(data), hashlib.sha256(data).hexdigest())
        return data

    def _compare(self, uri: str, size: int, sha256: str) -> None:
        if (size, sha256) != (self.bytes, self.sha256):
            raise StorageError(
                f"{uri} is damaged: it has {size:,} bytes with sha256 {sha256[:12]}, written were {self.bytes:,} "
                f"bytes with sha256 {self.sha256[:12]}: restore it, or delete its folder and run the stage again"
            )


Digests = dict[Inside, FileDigest]


def of_files(folder: str, names: Sequence[str]) -> dict[str, FileDigest]:
    """Digests of files that have just been written below `folder`, by name."""
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: storage.digest(storage.join(folder, name)), names)
        return {name: FileDigest(bytes=one[0], sha256=one[1]) for name, one in zip(names, found, strict=True)}


def check_present(folder: str, files: Mapping[str, FileDigest]) -> None:
    """Raises StorageError that names the first file below `folder` that is missing, a link, or of another size."""
    present = folders.contents(folder, files)
    for name, digest in files.items():
        uri, found = storage.join(folder, name), present.get(name)
        if found is None:
            raise StorageError(f"{uri} is missing: restore it, or delete {folder} and run the stage again")
        if found != digest.bytes:
            reason = "a link or a folder" if found is ... else f"{found:,} bytes instead of {digest.bytes:,}"
            raise StorageError(f"{uri} is damaged ({reason}): restore it, or delete {folder} and run the stage again")


def file_states(files: Sequence[FileInfo]) -> list[tuple[str, str]]:
    """(what a file's state is known by, its state) of every file; `fingerprint` says what these are."""
    hashed = sum(info.size for info in files) <= _HASHED_BYTES
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda info: storage.state(info.uri, hashed), files))


def fingerprint(files: Sequence[FileInfo], states: Sequence[tuple[str, str]] | None = None) -> tuple[str, str]:
    """SHA-256 that changes when a file, its name or the order of files does; and what it was made from, in words.

    Local files of up to 4 GB in all are hashed whole, so that a copy elsewhere has the same fingerprint. Larger ones are
    known by size, inode and times: a rewritten file has a new change time, whatever its modification time was set to.
    In an object store a file is known by its size and ETag, or by its modification time where there is none.
    """
    states = file_states(files) if states is None else states
    shared = os.path.commonprefix([info.uri for info in files])  # noqa: RUF071 - cut to a folder below
    root = posixpath.dirname(shared)
    digest = hashlib.sha256()
    for info, (_, state) in zip(files, states, strict=True):
        # Partitions above the first file that differs are values of columns, too.
        partitions = [part for part in root.split("/") if "=" in part]
        digest.update(json.dumps([info.uri.removeprefix(root), partitions, info.size, state]).encode())
    return digest.hexdigest(), " and ".join(dict.fromkeys(kind for kind, _ in states))
