"""Weights on disk, and a model rebuilt from its own record.

model.safetensors     weights and buffers
items.safetensors     the item table that the model was built with
dataset.json          the prepared dataset's record
tables-*.safetensors  rows of row_sharded tables, a file a worker (recray.training.sharded_tables); tables-state-* what their optimiser keeps
state.pt              optimiser, EMA, random state (only where training may go on)
checkpoint.json       CheckpointRecord, written last
"""

from __future__ import annotations

import io
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from recray import storage
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.errors import LineageError
from recray.layers import embedding
from recray.loading.batch import Feature, ItemTable, Jagged
from recray.models import Ranker, Retriever, build_model
from recray.records import CheckpointRecord, DatasetRecord
from recray.training.sharded_tables import ShardedTables


def save(
    folder: str,
    weights: dict[str, Tensor],
    items: ItemTable,
    dataset: DatasetRecord,
    record: CheckpointRecord,
    state: dict[str, Any] | None = None,
) -> CheckpointRecord:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    storage.write_bytes(storage.join(folder, "model.safetensors"), save_tensors(plain))
    storage.write_bytes(storage.join(folder, "items.safetensors"), save_tensors(_pack(items)))
    storage.write_json(storage.join(folder, "dataset.json"), dataset.model_dump(mode="json"))
    if state is not None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        storage.write_bytes(storage.join(folder, "state.pt"), buffer.getvalue())
    return record.write(folder)


def record_of(folder: str, dataset: PreparedDataset) -> CheckpointRecord:
    """The record of a checkpoint that was trained on this dataset. Raises LineageError where it was another."""
    record = CheckpointRecord.read(folder)
    if record.parents != [dataset.record.id]:
        raise LineageError(
            f"{folder} was trained on {', '.join(record.parents)}, but {dataset.uri} is {dataset.record.id}, whose ids mean "
            f"other items: train again, or prepare with the [data] and run.seed of that training"
        )
    return record


def load_state(folder: str) -> dict[str, Any]:
    data = storage.read_bytes(storage.join(folder, "state.pt"))
    state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    return state


def load_weights(folder: str) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = load_tensors(storage.read_bytes(storage.join(folder, "model.safetensors")))
    return weights


def load_model(folder: str) -> tuple[Retriever | Ranker, CheckpointRecord]:
    """The model in evaluation mode, rebuilt from the record beside its weights; rows of sharded tables stay on disk."""
    record = CheckpointRecord.read(folder)
    config = Config.model_validate(record.config)
    dataset = DatasetRecord.read(folder)
    items = _unpack(load_tensors(storage.read_bytes(storage.join(folder, "items.safetensors"))))
    with embedding.use_plan(embedding.TablePlan(stored=True)):
        model = build_model(config.model, dataset, items)
    weights = load_weights(folder)
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


def _unpack(tensors: dict[str, Tensor]) -> ItemTable:
    features: dict[str, Feature] = {}
    for key, tensor in tensors.items():
        name, colon, part = key.rpartition(":")
        if colon and part == "column":
            features[name] = tensor
        elif part == "values":
            features[name] = Jagged(tensor, tensors[f"{name}:offsets"])
    return ItemTable(tensors["counts"], features)
