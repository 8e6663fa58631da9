"""A checkpoint on disk, and the model rebuilt from it.

    model.safetensors         weights and buffers
    items.safetensors         the item table that the model was built with
    dataset.json              the record of the prepared dataset
    tables-*.safetensors      rows of row_sharded tables, one file per worker (recray.training.sharded_tables)
    checkpoint.json           CheckpointRecord, written last

An epoch that training can resume from has state.pt and tables-state-*.safetensors, too (recray.training.state).
A checkpoint needs no other file: `load_model` builds the model from the configuration in checkpoint.json.
"""

from __future__ import annotations

import hashlib
import io
from typing import IO, Any, cast

import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from recray import digests, sealed, storage
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.digests import FileDigest
from recray.errors import LineageError
from recray.layers import embedding
from recray.loading.batch import Feature, ItemTable, Jagged
from recray.models import Ranker, Retriever, build_model
from recray.records import CheckpointRecord, DatasetRecord
from recray.training import sharded_tables
from recray.training.sharded_tables import ShardedTables

_WEIGHTS, _ITEMS, _STATE = "model.safetensors", "items.safetensors", "state.pt"


def save_weights(folder: str, weights: dict[str, Tensor]) -> dict[str, FileDigest]:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    return _write(folder, _WEIGHTS, save_tensors(plain))


def save_state(folder: str, state: dict[str, Any]) -> dict[str, FileDigest]:
    with storage.writer(storage.join(folder, _STATE)) as stream:
        hashing = _Hashing(stream)
        torch.save(state, cast(IO[bytes], hashing))  # without a second copy in memory
    return {_STATE: FileDigest(bytes=hashing.size, sha256=hashing.digest.hexdigest())}


class _Hashing(io.RawIOBase):
    """A stream that hashes what is written to it."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self._stream, self.size, self.digest = stream, 0, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._stream.write(data)
        self.digest.update(data)
        self.size += len(data)
        return len(data)


def save_record(
    folder: str, record: CheckpointRecord, dataset: DatasetRecord, items: ItemTable, files: dict[str, FileDigest]
) -> CheckpointRecord:
    """Write what rebuilds the model, then the record, which completes the checkpoint. files: what is written already."""
    body = sealed.dump(dataset.model_dump(mode="json"))
    files = files | _write(folder, _ITEMS, save_tensors(_pack(items)))
    files |= _write(folder, DatasetRecord.file_name(), body)
    return record.model_copy(update={"files": files}).write(folder)


def _write(folder: str, name: str, data: bytes) -> dict[str, FileDigest]:
    storage.write_bytes(storage.join(folder, name), data)
    return {name: FileDigest.of(data)}


def publish(folder: str, target: str, record: CheckpointRecord) -> CheckpointRecord:
    """Copy an epoch without its training state to `target`, with `record`, which is written last."""
    tables = [sharded_tables.file_name("tables", piece, record.pieces) for piece in range(record.pieces)]
    kept = (_WEIGHTS, _ITEMS, DatasetRecord.file_name(), *tables)
    for name in kept:
        storage.copy_file(storage.join(folder, name), storage.join(target, name))
    files = {name: digest for name, digest in record.files.items() if name in kept}
    return record.model_copy(update={"files": files}).write(target)


def verify(folder: str) -> CheckpointRecord:
    """The record of a checkpoint whose files are what was written. Raises StorageError or LineageError if one is not."""
    record = CheckpointRecord.read(folder)
    for name, digest in record.files.items():
        digest.check(storage.join(folder, name))
    return record


def record_of(folder: str, dataset: PreparedDataset) -> CheckpointRecord:
    """The record of a checkpoint. Raises LineageError if it was trained on another dataset."""
    record = CheckpointRecord.read(folder)
    if record.parents[:1] != [dataset.record.id]:
        raise LineageError(
            f"{folder} was trained on {', '.join(record.parents)}, whose item ids do not match {dataset.uri} "
            f"({dataset.record.id}): train again, or prepare with the [data] and run.seed of that training"
        )
    return record


def load_state(folder: str) -> dict[str, Any]:
    """What `save_state` wrote, on the CPU. Nothing but tensors and plain values is unpickled."""
    data = storage.read_bytes(storage.join(folder, _STATE))
    state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    return state


def load_weights(folder: str) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = load_tensors(storage.read_bytes(storage.join(folder, _WEIGHTS)))
    return weights


def _load(folder: str, record: CheckpointRecord, name: str) -> dict[str, Tensor]:
    """Tensors of a file that is what was written. Raises StorageError if it is not."""
    uri = storage.join(folder, name)
    if name not in record.files:
        raise LineageError(f"{folder} has a record without {name}: train again")
    try:
        tensors: dict[str, Tensor] = load_tensors(record.files[name].read(uri))
    except SafetensorError as error:
        raise LineageError(f"{uri} is damaged ({error}): train again") from None
    return tensors


def load_model(folder: str) -> tuple[Retriever | Ranker, CheckpointRecord]:
    """The model in evaluation mode, built from the configuration in its record. Rows of sharded tables stay on disk."""
    record = CheckpointRecord.read(folder)
    config = Config.model_validate(record.config)
    digests.check_present(folder, record.files)
    dataset = DatasetRecord.read(folder, copy=True)
    items = _unpack(_load(folder, record, _ITEMS), storage.join(folder, _ITEMS))
    for name, digest in record.files.items():
        if name.startswith("tables-"):
            digest.check(storage.join(folder, name))
    with embedding.use_plan(embedding.TablePlan(stored=True)):
        model = build_model(config, dataset, items)
    weights = _load(folder, record, _WEIGHTS)
    embedding.read_missing(model, weights, ShardedTables(folder, "tables", record.pieces).rows)
    model.load_state_dict(weights, assign=True)
    return model.eval(), record


def _pack(items: ItemTable) -> dict[str, Tensor]:
    out = {"counts": items.counts_N}
    for name, feature in items.features.items():
        if isinstance(feature, Jagged):
            out |= {f"{name}:values": feature.values, f"{name}:offsets": feature.offsets}
        else:
            out[f"{name}:column"] = feature
    return {name: tensor.contiguous() for name, tensor in out.items()}


def _unpack(tensors: dict[str, Tensor], uri: str) -> ItemTable:
    """Raises LineageError for offsets that lead outside of their values: torch would read and write there."""
    features: dict[str, Feature] = {}
    rows = len(tensors["counts"])
    for key, tensor in tensors.items():
        name, colon, part = key.rpartition(":")
        if colon and part == "column":
            features[name] = tensor
        elif part == "values":
            offsets = tensors[f"{name}:offsets"]
            ends = offsets[:1].tolist() + offsets[-1:].tolist()
            if len(offsets) != rows + 1 or ends != [0, len(tensor)] or bool((offsets[1:] < offsets[:-1]).any()):
                raise LineageError(
                    f"{uri} has offsets of '{name}' that do not divide its {len(tensor)} values: train again"
                )
            features[name] = Jagged(tensor, offsets)
    return ItemTable(tensors["counts"], features)
