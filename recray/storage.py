"""The only code that touches paths: local files, s3:// and gs:// through pyarrow.fs.

A location is a string: a local path or a URI. S3 endpoints other than AWS are
named by AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, as for every AWS client.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import os
import re
import socket
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from recray import credentials, strict_json
from recray.errors import DataError, StorageError

_PART_BYTES = 16 << 20  # copied at a time
_THREADS = 16
_S3_OPTIONS = ("region", "scheme", "endpoint_override")
_CONNECT_SECONDS = 5.0
_S3_ATTEMPTS = 11  # with waits of 25 ms and twice as long each time, 25 s in all


@dataclass(frozen=True)
class FileInfo:
    uri: str
    size: int  # bytes


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a location and the path inside it. Raises ConfigError if the URI holds credentials."""
    credentials.refuse(uri, "this URI")
    uri = re.sub(r"^s3[an]://", "s3://", uri)  # Hadoop's names of the same store
    scheme = urlsplit(uri).scheme if "://" in uri else ""
    with errors_at(uri, "opened"):
        if scheme in ("", "file"):
            return pafs.LocalFileSystem(), local_path(uri)
        if scheme == "s3":
            return _s3(uri)
        if scheme == "gs":
            return pafs.FileSystem.from_uri(uri)  # type: ignore[no-any-return]
    raise StorageError(f"cannot open {uri!r}: the scheme '{scheme}://' is not known; use a local path, s3:// or gs://")


def _s3(uri: str) -> tuple[pafs.FileSystem, str]:
    """s3://BUCKET/KEY, with options such as ?region=eu-central-1 behind it that win over the environment's."""
    place, _, query = uri.removeprefix("s3://").partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := options.keys() - _S3_OPTIONS:
        raise StorageError(f"cannot open {uri!r}: unknown option {min(unknown)!r}; known are {', '.join(_S3_OPTIONS)}")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and "endpoint_override" not in options:
        credentials.refuse(endpoint, "AWS_ENDPOINT_URL")
        parts = urlsplit(endpoint)
        options = {"endpoint_override": parts.netloc, "scheme": parts.scheme} | options
        _check_answers(parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443))
    region = options.pop("region", "") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region:
        region = "us-east-1" if "endpoint_override" in options else pafs.resolve_s3_region(place.partition("/")[0])
    # Of requests that fail three times in ten, two in a million fail in every attempt; with Arrow's three it is one in 37.
    retries = pafs.AwsDefaultS3RetryStrategy(max_attempts=_S3_ATTEMPTS)
    return pafs.S3FileSystem(region=region, retry_strategy=retries, **options), place.rstrip("/")


@functools.cache
def _check_answers(host: str, port: int) -> None:
    """Raise OSError if nothing listens at a store of one's own: retries take almost a minute to say so."""
    if not urllib.request.getproxies():
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()


def is_remote(uri: str) -> bool:
    """Whether this is a place in an object store."""
    return "://" in uri and not uri.startswith("file://")


def local_path(location: str) -> str:
    """The absolute path of a local location: a path, which may begin with ~, or a file: URI with percent codes."""
    if location.startswith("file:/"):
        location = unquote(location.removeprefix("file:").removeprefix("//").removeprefix("localhost"))
    return os.path.abspath(os.path.expanduser(location))


def join(uri: str, *parts: str) -> str:
    """`uri` and `parts` with single slashes between them."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def look(uri: str) -> tuple[Literal["file", "folder", "nothing"], int]:
    """What is there, and the bytes of a file."""
    system, path = resolve(uri)
    with errors_at(uri, "looked at"):
        info = system.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        return "nothing", 0
    return ("folder", 0) if info.type == pafs.FileType.Directory else ("file", info.size or 0)


def exists(uri: str) -> bool:
    return look(uri)[0] != "nothing"


def list_files(folder: str, suffix: str = ".parquet") -> list[FileInfo]:
    """The files directly in a folder that recray wrote, sorted by name."""
    system, path = resolve(folder)
    with errors_at(folder, "listed"):
        found = system.get_file_info(pafs.FileSelector(path))
    names = sorted(entry.base_name for entry in found if entry.type == pafs.FileType.File)
    return [FileInfo(join(folder, name), 0) for name in names if name.endswith(suffix)]


def real_path(uri: str) -> str:
    """What two names of one file have in common: the path without links; the URI itself on an object store."""
    system, path = resolve(uri)
    return os.path.realpath(path) if isinstance(system, pafs.LocalFileSystem) else uri


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly below a folder, sorted; empty where it does not exist."""
    system, path = resolve(uri)
    with errors_at(uri, "listed"):
        if system.get_file_info(path).type != pafs.FileType.Directory:
            return []
        found = system.get_file_info(pafs.FileSelector(path))
    return sorted(entry.base_name for entry in found if entry.type == pafs.FileType.Directory)


def link(uri: str, target: str) -> None:
    """A symbolic link at `uri` to its neighbour `target`, replaced as one step; nothing happens where there are no links,
    or where something else lies."""
    system, path = resolve(uri)
    if not isinstance(system, pafs.LocalFileSystem):
        return
    old = os.readlink(path) if os.path.islink(path) else None
    if old == target or (old is None and os.path.lexists(path)) or "/" in (old or ""):
        return
    part = _part_of(path)
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
                if "INTERNAL_FAILURE" not in str(error) or attempt == _S3_ATTEMPTS:
                    raise
            time.sleep(0.0125 * 2**attempt)
            attempt += 1


def write_bytes(uri: str, data: bytes) -> None:
    """Write whole or not at all, and to the disk itself: it is there after a power failure."""
    with _atomic(uri, durable=True) as path, open(path, "wb") as stream:
        stream.write(data)


@contextlib.contextmanager
def writer(uri: str) -> Iterator[BinaryIO]:
    """A stream whose bytes are at `uri` when the block ends well; what was there stays when it does not."""
    with _atomic(uri) as path, open(path, "wb") as stream:
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
def open_parquet(uri: str, data: bytes | None = None, whole: bool = False) -> Iterator[pq.ParquetFile]:
    """A Parquet file; the checksums of its pages are verified where it has them.

    data: its bytes, if they are read already. whole: it is read at once, so that few large requests to a store do.
    Raises DataError if the file is damaged, encrypted or no Parquet file, StorageError if it cannot be read.
    """
    system, path = resolve(uri)
    try:
        with system.open_input_file(path) if data is None else pa.BufferReader(data) as stream:
            yield pq.ParquetFile(stream, page_checksum_verification=True, pre_buffer=whole and is_remote(uri))
    except (pa.ArrowInvalid, OSError) as error:
        # Arrow reports damaged pages and footers as OSError without an errno.
        if isinstance(error, OSError) and (error.errno is not None or "AWS Error" in str(error)):
            raise StorageError(f"{uri} cannot be read: {error}; check the path and the credentials") from error
        reason = str(error).splitlines()[0]
        if "decrypt" in reason:
            raise DataError(
                f"{uri} is encrypted ({reason}): recray has no keys; write a copy without encryption"
            ) from error
        kind = "truncated or corrupt"
        if "CRC" in reason:
            kind = "changed after it was written: the checksum of a page does not match"
        elif "size is 0 bytes" in reason:
            kind = "empty: 0 bytes"
        elif "magic bytes" in reason and not _begins_as_parquet(system, path):
            kind = "another format: it does not begin with PAR1"
        raise DataError(
            f"{uri} is not a whole Parquet file ({kind}): {reason}; write it again or take it out"
        ) from error


def _begins_as_parquet(system: pafs.FileSystem, path: str) -> bool:
    with system.open_input_file(path) as stream:
        return bytes(stream.read(4)) == b"PAR1"


def read_table(uri: str, columns: list[str] | None = None, data: bytes | None = None) -> pa.Table:
    """One Parquet file. Raises DataError naming the file when it is not whole."""
    with open_parquet(uri, data, whole=True) as file:
        return file.read(columns=columns, use_threads=False)


def read_schema(uri: str) -> tuple[pa.Schema, int]:
    """Schema and number of rows from a Parquet file's footer."""
    with open_parquet(uri) as file:
        return file.schema_arrow, file.metadata.num_rows


def write_table(uri: str, table: pa.Table, row_group_rows: int = 65_536) -> None:
    # Measurements seldom repeat: a dictionary of them costs space, and a tenth of the time of reading.
    repeated = [
        field.name + (".list.element" if pa.types.is_list(field.type) else "")
        for field in table.schema
        if not pa.types.is_floating(field.type.value_type if pa.types.is_list(field.type) else field.type)
    ]
    with _atomic(uri) as path:
        pq.write_table(
            table,
            path,
            compression="zstd",
            use_dictionary=repeated,
            row_group_size=max(1, row_group_rows),
            write_page_checksum=True,
        )


def state(uri: str, hashed: bool) -> tuple[str, str]:
    """(what a file's state is known by, its state)."""
    system, path = resolve(uri)
    with errors_at(uri, "read"):
        if not isinstance(system, pafs.LocalFileSystem):
            with system.open_input_file(path) as file:
                tags = {key.lower(): value for key, value in (file.metadata() or {}).items()}
            tag = tags.get("etag")
            return ("ETag", tag.decode()) if tag else ("modification time", str(system.get_file_info(path).mtime_ns))
        if not hashed:
            stat = os.stat(path)
            return "inode and times", f"{stat.st_ino} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        with open(path, "rb") as stream:
            return "content", hashlib.file_digest(stream, "sha256").hexdigest()


def check_writable(uri: str) -> None:
    """Raise StorageError if a local folder cannot be made and written to. Leaves nothing behind; asks no object store."""
    system, path = resolve(uri)
    if not isinstance(system, pafs.LocalFileSystem):
        return
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    try:
        if not os.path.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, "is no folder")
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(
            f"{uri} cannot be written ({path}: {reason}): choose a folder where you can write"
        ) from error


@contextlib.contextmanager
def errors_at(uri: str, done: str) -> Iterator[None]:
    """Inside the block every failure of a file system becomes a StorageError that names the location."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise StorageError(f"disk full: {uri} cannot be {done}; free space or set run.output elsewhere") from error
        raise StorageError(f"{uri} cannot be {done}: {error}") from error


@contextlib.contextmanager
def _atomic(uri: str, durable: bool = False) -> Iterator[str]:
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
        part = _part_of(path)
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


def _part_of(path: str) -> str:
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
