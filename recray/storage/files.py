"""Files: read, written whole or not at all, copied, hashed and deleted."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.fs as pafs

from recray import strict_json
from recray.errors import StorageError
from recray.storage.filesystems import S3_ATTEMPTS, errors_at, join, resolve

_PART_BYTES = 16 << 20  # copied at a time
_THREADS = 16


def link(uri: str, target: str) -> None:
    """A symbolic link at `uri` to its neighbour `target`, replaced as one step; nothing happens where there are no links,
    or where something else lies."""
    system, path = resolve(uri)
    if not isinstance(system, pafs.LocalFileSystem):
        return
    old = os.readlink(path) if os.path.islink(path) else None
    if old == target or (old is None and os.path.lexists(path)) or "/" in (old or ""):
        return
    part = part_of(path)
    with contextlib.suppress(OSError):  # a file system without links
        os.symlink(target, part)
        os.replace(part, path)


def read_bytes(uri: str) -> bytes:
    system, path = resolve(uri)
    with errors_at(uri, "read"):
        attempt = 1
        while True:
            try:
                with system.open_input_stream(path) as stream:
                    return bytes(stream.read())
            except OSError as error:
                # Arrow gives the answer of a busy store as much room as the object. Where that is too little it does not
                # understand the answer, and does not try again.
                if "INTERNAL_FAILURE" not in str(error) or attempt == S3_ATTEMPTS:
                    raise
            time.sleep(0.0125 * 2**attempt)
            attempt += 1


def write_bytes(uri: str, data: bytes) -> None:
    """Write whole or not at all, and to the disk itself: it is there after a power failure."""
    with atomic(uri, durable=True) as path, open(path, "wb") as stream:
        stream.write(data)


@contextlib.contextmanager
def writer(uri: str) -> Iterator[BinaryIO]:
    """A stream whose bytes are at `uri` when the block ends well; what was there stays when it does not."""
    with atomic(uri) as path, open(path, "wb") as stream:
        yield stream


def copy_file(source: str, target: str) -> None:
    """A part at a time: a file may be larger than memory."""
    system, path = resolve(source)
    with writer(target) as out, errors_at(source, "read"), system.open_input_stream(path) as stream:
        while part := stream.read(_PART_BYTES):
            out.write(part)


def copy_folder(source: str, target: str) -> None:
    """Copy the files of a folder (not recursive), the record checkpoint.json, index.json, ... last."""
    system, path = resolve(source)
    with errors_at(source, "listed"):
        entries = system.get_file_info(pafs.FileSelector(path))
    names = [entry.base_name for entry in entries if entry.type == pafs.FileType.File]
    for name in sorted(names, key=lambda name: (name.endswith(".json"), name != "dataset.json", name)):
        copy_file(join(source, name), join(target, name))


@contextlib.contextmanager
def local_file(uri: str) -> Iterator[str]:
    """A local path of the file: its own, or of a copy that lasts as long as the block."""
    system, path = resolve(uri)
    if isinstance(system, pafs.LocalFileSystem):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, "copy")
        copy_file(uri, copy)
        yield copy


def digest(uri: str) -> tuple[int, str]:
    """Size in bytes, and SHA-256, of a file."""
    system, path = resolve(uri)
    size, found = 0, hashlib.sha256()
    with errors_at(uri, "read"), system.open_input_stream(path) as stream:
        while part := stream.read(_PART_BYTES):
            size += len(part)
            found.update(part)
    return size, found.hexdigest()


def delete_file(uri: str) -> None:
    """Delete a file; nothing happens when it is not there."""
    system, path = resolve(uri)
    with errors_at(uri, "deleted"), contextlib.suppress(FileNotFoundError):
        system.delete_file(path)


def read_json(uri: str) -> Any:
    """Raises StorageError that names the file if it is no JSON."""
    try:
        return strict_json.loads(read_bytes(uri))
    except ValueError as error:
        raise StorageError(f"{uri} is not valid JSON: {error}") from None


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, (strict_json.dumps(value, indent=2) + "\n").encode())


def delete_empty_folder(uri: str) -> None:
    """Delete a local folder if nothing is in it; an object store has no empty folders."""
    system, path = resolve(uri)
    if isinstance(system, pafs.LocalFileSystem):
        with contextlib.suppress(OSError):
            os.rmdir(path)


@contextlib.contextmanager
def atomic(uri: str, durable: bool = False) -> Iterator[str]:
    """A local path to write to, whose file is moved to `uri` when the block ends well and deleted when it does not.

    durable: the file and its name are on the disk when the block ends; on an object store they always are.
    """
    system, path = resolve(uri)
    with errors_at(uri, "written"):
        if not isinstance(system, pafs.LocalFileSystem):
            # A stream to the store completes the upload of what it has when the block fails (apache/arrow#40502), and
            # replaces a good object by a part of another.
            with tempfile.TemporaryDirectory() as folder:
                part = os.path.join(folder, "part")
                yield part
                # In a thread, which no signal interrupts between opening the stream and the end of the write.
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(_upload, system, part, path).result()
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        part = part_of(path)
        try:
            yield part
            if durable:
                _sync(part)
            os.replace(part, path)
            if durable:
                _sync(os.path.dirname(path))
        finally:
            if os.path.exists(part):
                os.unlink(part)


def _upload(system: pafs.FileSystem, source: str, path: str) -> None:
    stream = system.open_output_stream(path)
    if os.path.getsize(source):
        with pa.memory_map(source) as data:
            stream.write(data.read_buffer())
    stream.close()  # pyarrow.fs.copy_files does not raise what this raises


def part_of(path: str) -> str:
    """A file next to `path` that is written and then moved there."""
    return f"{path}.{uuid.uuid4().hex[:8]}.part"


def delete_parts(uri: str) -> None:
    """Delete what killed processes have half written of a local file or link."""
    system, path = resolve(uri)
    if isinstance(system, pafs.LocalFileSystem):
        for part in glob.glob(f"{glob.escape(path)}.{'[0-9a-f]' * 8}.part"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)


def sync(folder: str, names: Iterable[str]) -> None:
    """Wait until files below a local folder, and their names, are on the disk."""
    system, path = resolve(folder)
    if not isinstance(system, pafs.LocalFileSystem):
        return
    files = [os.path.join(path, name) for name in names]
    with errors_at(folder, "written"), ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(_sync, files))
        list(pool.map(_sync, {os.path.dirname(file) for file in files}))


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
