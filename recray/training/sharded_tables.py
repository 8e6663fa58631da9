"""Sharded embedding tables on disk: file r of P holds the rows of ids with id % P == r, in order of id.

For example, P = 2 and a table of 5 rows:

    tables-00000-of-00002.safetensors    rows 0, 2, 4
    tables-00001-of-00002.safetensors    rows 1, 3

A file is written without a copy of the rows and read through a memory map: a process holds only the rows that it asks
for, and processes of one machine share the file cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from recray import storage
from recray.digests import FileDigest


def file_name(kind: str, piece: int, count: int) -> str:
    return f"{kind}-{piece:05d}-of-{count:05d}.safetensors"


def write(folder: str, kind: str, piece: int, count: int, tensors: dict[str, Tensor]) -> dict[str, FileDigest]:
    """Write file `piece` of `count`; float32 tensors with an entry per row of this piece. Returns the file's digest.

    safetensors' own writer needs all bytes in memory a second time, so the format is written here: the length of the
    header (8 bytes, little endian), the header (JSON), and the tensors' bytes.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header: dict[str, Any] = {}
    at = 0
    for name, tensor in plain.items():
        end = at + tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    name, head = file_name(kind, piece, count), len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    with storage.writer(storage.join(folder, name)) as stream:
        stream.write(head)
        for tensor in plain.values():
            data = tensor.view(-1).numpy().view("uint8")
            digest.update(data.data)
            stream.write(data.data)
    return {name: FileDigest(bytes=len(head) + at, sha256=digest.hexdigest())}


class ShardedTables:
    """Reads the files of one kind in a folder. Each file is opened when it is first needed."""

    def __init__(self, folder: str, kind: str, count: int) -> None:
        self._folder, self._kind, self.count = folder, kind, count
        self._open: dict[int, Any] = {}

    def names(self) -> list[str]:
        return list(self._piece(0).keys()) if self.count else []

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """(n, ...): the rows of ids (n,), from the files that hold them."""
        piece = ids % self.count
        out = None
        for number in torch.unique(piece).tolist():
            at = piece == number
            found = self._tensor(number, name).index_select(0, ids[at] // self.count)
            out = found.new_empty(len(ids), *found.shape[1:]) if out is None else out
            out[at] = found
        return self._tensor(0, name)[:0] if out is None else out

    def fill(self, name: str, out: Tensor, rank: int, world_size: int) -> None:
        """Set out[i] to the row of id rank + i * world_size, whatever the number of files. Reads a million rows at a time."""
        for number in range(self.count):
            tensor = self._tensor(number, name)
            for block in _blocks(len(tensor)):
                ids = torch.arange(block.start, block.stop) * self.count + number
                mine = (ids % world_size == rank).nonzero()[:, 0]
                out[(ids[mine] // world_size).to(out.device)] = tensor[block][mine].to(out.device)

    def _tensor(self, number: int, name: str) -> Tensor:
        return self._piece(number).get_tensor(name)  # type: ignore[no-any-return]

    def _piece(self, number: int) -> Any:
        if number not in self._open:
            with storage.local_file(storage.join(self._folder, file_name(self._kind, number, self.count))) as path:
                self._open[number] = safe_open(
                    path, framework="pt"
                )  # an open file stays readable after its temporary copy is deleted
        return self._open[number]


def _blocks(rows: int, size: int = 1 << 20) -> Iterable[slice]:
    return (slice(at, min(at + size, rows)) for at in range(0, rows, size))
