"""The only code that touches paths: local files, s3:// and gs:// through pyarrow.fs.

A location is a string: a local path or a URI. S3 endpoints other than AWS are
named by AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, as for every AWS client.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import posixpath
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from recray import strict_json
from recray.errors import DataError, StorageError

_GLOB = "*?["
_PART_BYTES = 16 << 20  # copied at a time
_TAIL_BYTES = 65_536  # a Parquet footer with its statistics lies in a file's tail


@dataclass(frozen=True)
class FileInfo:
    uri: str
    size: int  # bytes


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a location and the path inside it."""
    scheme = urlsplit(uri).scheme if "://" in uri else ""
    with _errors(uri, "opened"):
        if scheme in ("", "file"):
            return pafs.LocalFileSystem(), os.path.abspath(uri.removeprefix("file://"))
        if scheme == "s3":
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            if endpoint and "?" not in uri:
                parts = urlsplit(endpoint)
                region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
                system = pafs.S3FileSystem(endpoint_override=parts.netloc, scheme=parts.scheme, region=region)
                return system, uri.removeprefix("s3://").rstrip("/")
        if scheme in ("s3", "gs"):
            return pafs.FileSystem.from_uri(uri)  # type: ignore[no-any-return]
    raise StorageError(f"cannot open {uri!r}: the scheme '{scheme}://' is not known; use a local path, s3:// or gs://")


def join(uri: str, *parts: str) -> str:
    """`uri` and `parts` with single slashes between them."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def exists(uri: str) -> bool:
    system, path = resolve(uri)
    with _errors(uri, "looked at"):
        return bool(system.get_file_info(path).type != pafs.FileType.NotFound)


def list_files(location: str | Sequence[str], suffix: str = ".parquet") -> list[FileInfo]:
    """Files of a file, folder (recursive), glob or list of these, in a fixed order.

    Names that begin with '_' or '.' are skipped, as Spark's markers are.
    Raises StorageError when nothing is found.
    """
    if not isinstance(location, str):
        return [info for one in location for info in list_files(one, suffix)]
    base = location
    if any(mark in location for mark in _GLOB):
        head = location[: min(location.index(mark) for mark in _GLOB if mark in location)]
        base = head.rpartition("/")[0] or ("." if not head.startswith("/") else "/")
    system, path = resolve(base)
    with _errors(location, "listed"):
        info = system.get_file_info(path)
        if info.type == pafs.FileType.File:
            return [FileInfo(location, info.size)]
        if info.type == pafs.FileType.NotFound:
            raise StorageError(f"{location} does not exist: give a Parquet file, a folder, a glob or a list of them")
        found = system.get_file_info(pafs.FileSelector(path, recursive=True))
    prefix = path.rstrip("/") + "/"
    _, pattern = resolve(location) if base != location else (system, None)
    files = []
    for entry in sorted(found, key=lambda entry: entry.path):
        inside = entry.path.removeprefix(prefix)
        hidden = any(part.startswith(("_", ".")) for part in inside.split("/"))
        if entry.type != pafs.FileType.File or hidden or not entry.path.endswith(suffix):
            continue
        if (
            pattern is None
            or fnmatch.fnmatchcase(entry.path, pattern)
            or fnmatch.fnmatchcase(entry.path, f"{pattern}/*")
        ):
            files.append(FileInfo(join(base, inside), entry.size))
    if not files:
        raise StorageError(f"no '*{suffix}' files in {location} ({len(found)} other entries): check the path")
    return files


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly below a folder, sorted; empty where it does not exist."""
    system, path = resolve(uri)
    with _errors(uri, "listed"):
        if system.get_file_info(path).type != pafs.FileType.Directory:
            return []
        found = system.get_file_info(pafs.FileSelector(path))
    return sorted(entry.base_name for entry in found if entry.type == pafs.FileType.Directory)


def folder_size(uri: str) -> int:
    """Bytes of all files below a folder."""
    system, path = resolve(uri)
    with _errors(uri, "listed"):
        return sum(entry.size or 0 for entry in system.get_file_info(pafs.FileSelector(path, recursive=True)))


def link(uri: str, target: str) -> None:
    """A symbolic link at `uri` to its neighbour `target`, replaced as one step; nothing happens where there are no links."""
    system, path = resolve(uri)
    if not isinstance(system, pafs.LocalFileSystem):
        return
    part = f"{path}.{uuid.uuid4().hex[:8]}.part"
    with contextlib.suppress(OSError):  # a file system without links
        if not os.path.islink(path) or os.readlink(path) != target:
            os.symlink(target, part)
            os.replace(part, path)


def read_bytes(uri: str) -> bytes:
    system, path = resolve(uri)
    with _errors(uri, "read"), system.open_input_stream(path) as stream:
        return bytes(stream.read())


def write_bytes(uri: str, data: bytes) -> None:
    """Write whole or not at all."""
    with _atomic(uri) as (system, path), system.open_output_stream(path) as stream:
        stream.write(data)


@contextlib.contextmanager
def writer(uri: str) -> Iterator[pa.NativeFile]:
    """A stream whose bytes are at `uri` when the block ends well, and nothing when it does not."""
    with _atomic(uri) as (system, path), system.open_output_stream(path) as stream:
        yield stream


def copy_file(source: str, target: str) -> None:
    """A part at a time: a file may be larger than memory."""
    system, path = resolve(source)
    with writer(target) as out, _errors(source, "read"), system.open_input_stream(path) as stream:
        while part := stream.read(_PART_BYTES):
            out.write(part)


def copy_folder(source: str, target: str) -> None:
    """Copy the files of a folder (not recursive), the record checkpoint.json, index.json, ... last."""
    system, path = resolve(source)
    with _errors(source, "listed"):
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
    with _errors(uri, "read"), system.open_input_stream(path) as stream:
        while part := stream.read(_PART_BYTES):
            size += len(part)
            found.update(part)
    return size, found.hexdigest()


def delete_file(uri: str) -> None:
    """Delete a file; nothing happens when it is not there."""
    system, path = resolve(uri)
    with _errors(uri, "deleted"), contextlib.suppress(FileNotFoundError):
        system.delete_file(path)


def read_json(uri: str) -> Any:
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, (strict_json.dumps(value, indent=2) + "\n").encode())


def delete_folder(uri: str) -> None:
    """Delete a folder and what is in it; nothing happens when it is not there."""
    system, path = resolve(uri)
    with _errors(uri, "deleted"):
        if system.get_file_info(path).type == pafs.FileType.Directory:
            system.delete_dir(path)


def delete_empty_folder(uri: str) -> None:
    """Delete a local folder if nothing is in it; an object store has no empty folders."""
    system, path = resolve(uri)
    if isinstance(system, pafs.LocalFileSystem):
        with contextlib.suppress(OSError):
            os.rmdir(path)


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """One Parquet file. Raises DataError naming the file when it is not whole."""
    system, path = resolve(uri)
    with _errors(uri, "read"), system.open_input_file(path) as file:
        return pq.ParquetFile(file).read(columns=columns, use_threads=False)


def read_schema(uri: str) -> tuple[pa.Schema, int]:
    """Schema and number of rows from a Parquet file's footer."""
    system, path = resolve(uri)
    with _errors(uri, "read"), system.open_input_file(path) as file:
        parquet = pq.ParquetFile(file)
        return parquet.schema_arrow, parquet.metadata.num_rows


def write_table(uri: str, table: pa.Table, row_group_rows: int = 65_536) -> None:
    # Measurements seldom repeat: a dictionary of them costs space, and a tenth of the time of reading.
    repeated = [
        field.name + (".list.element" if pa.types.is_list(field.type) else "")
        for field in table.schema
        if not pa.types.is_floating(field.type.value_type if pa.types.is_list(field.type) else field.type)
    ]
    with _atomic(uri) as (system, path):
        pq.write_table(
            table,
            path,
            filesystem=system,
            compression="zstd",
            use_dictionary=repeated,
            row_group_size=max(1, row_group_rows),
        )


def fingerprint(files: Sequence[FileInfo]) -> str:
    """SHA-256 over names, sizes and tails (Parquet footers) of files: changes when any file does."""
    digest = hashlib.sha256()
    root = posixpath.commonpath([info.uri for info in files]) if len(files) > 1 else posixpath.dirname(files[0].uri)
    for info in files:
        digest.update(f"{posixpath.relpath(info.uri, root)}\0{info.size}\0".encode())
        system, path = resolve(info.uri)
        with _errors(info.uri, "read"), system.open_input_file(path) as file:
            tail = min(_TAIL_BYTES, info.size)
            digest.update(file.read_at(tail, info.size - tail))
    return digest.hexdigest()


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
def _errors(uri: str, done: str) -> Iterator[None]:
    """Every failure below names the location."""
    try:
        yield
    except pa.ArrowInvalid as error:
        raise DataError(f"{uri} is not a whole Parquet file: {error}; write it again or leave it out") from error
    except OSError as error:
        if error.errno == errno.ENOSPC or "No space left" in str(error):
            raise StorageError(f"disk full: {uri} cannot be {done}; free space or set run.output elsewhere") from error
        raise StorageError(f"{uri} cannot be {done}: {error}") from error


@contextlib.contextmanager
def _atomic(uri: str) -> Iterator[tuple[pafs.FileSystem, str]]:
    """A path to write to, moved to `uri` when the block ends well and deleted when it does not."""
    system, path = resolve(uri)
    with _errors(uri, "written"):
        if not isinstance(system, pafs.LocalFileSystem):
            yield system, path  # an object store shows an object only once it is whole
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        part = f"{path}.{uuid.uuid4().hex[:8]}.part"
        try:
            yield system, part
            os.replace(part, path)
        finally:
            if os.path.exists(part):
                os.unlink(part)
