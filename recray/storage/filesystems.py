"""Locations: local paths, s3:// and gs:// through pyarrow.fs, and what is there.

A location is a string: a local path or a URI. S3 endpoints other than AWS are
named by AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, as for every AWS client.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import socket
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from recray import credentials
from recray.errors import StorageError

_S3_OPTIONS = ("region", "scheme", "endpoint_override")
_CONNECT_SECONDS = 5.0
S3_ATTEMPTS = 11  # with waits of 25 ms and twice as long each time, 25 s in all


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
    retries = pafs.AwsDefaultS3RetryStrategy(max_attempts=S3_ATTEMPTS)
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
