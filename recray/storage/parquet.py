"""Parquet files: opened with their page checksums verified, and written with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from recray.errors import DataError, StorageError
from recray.storage.files import atomic
from recray.storage.filesystems import is_remote, resolve


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


def write_table(
    uri: str, table: pa.Table, row_group_rows: int = 65_536, compression: Literal["zstd", "lz4", "none"] = "zstd"
) -> None:
    # Measurements seldom repeat: a dictionary of them costs space, and a tenth of the time of reading.
    repeated = [
        field.name + (".list.element" if pa.types.is_list(field.type) else "")
        for field in table.schema
        if not pa.types.is_floating(field.type.value_type if pa.types.is_list(field.type) else field.type)
    ]
    with atomic(uri) as path:
        pq.write_table(
            table,
            path,
            compression=compression,
            use_dictionary=False if compression == "none" else repeated,
            row_group_size=max(1, row_group_rows),
            write_page_checksum=True,
        )
