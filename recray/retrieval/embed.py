"""Item and user vectors out of a checkpoint."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from recray import checkpoint, storage
from recray.batches import questions
from recray.data.prepared import PreparedDataset

_CHUNK = 65_536
_PARALLEL_ABOVE = 200_000  # below it, starting workers takes longer than the vectors


def item_vectors(checkpoint_uri: str, num_items: int, parallel: bool) -> np.ndarray:
    """(N, D) float32, row i is item id i; by Ray Data tasks for large catalogues when `parallel`."""
    chunks = [{"start": at, "stop": min(at + _CHUNK, num_items)} for at in range(0, num_items, _CHUNK)]
    if not parallel or num_items < _PARALLEL_ABOVE:
        model, _ = checkpoint.load_model(checkpoint_uri)
        return np.concatenate([_vectors(model, chunk["start"], chunk["stop"]) for chunk in chunks])
    import ray.data

    work = ray.data.from_items(chunks, override_num_blocks=len(chunks)).map_batches(
        _export_chunk,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"checkpoint_uri": checkpoint_uri},
    )
    pieces = {}
    for table in work.iter_batches(batch_size=None, batch_format="pyarrow"):
        for start, rows, flat in zip(table["start"], table["rows"], table["vectors"], strict=True):
            pieces[start.as_py()] = flat.values.to_numpy().reshape(rows.as_py(), -1)
    return np.concatenate([pieces[start] for start in sorted(pieces)])


def _export_chunk(batch: pa.Table, checkpoint_uri: str) -> pa.Table:
    model, _ = checkpoint.load_model(checkpoint_uri)
    out = [(row["start"], _vectors(model, row["start"], row["stop"])) for row in batch.to_pylist()]
    return pa.table(
        {
            "start": [at for at, _ in out],
            "rows": [len(vectors) for _, vectors in out],
            "vectors": pa.array([vectors.reshape(-1) for _, vectors in out], pa.large_list(pa.float32())),
        }
    )


@torch.inference_mode()
def _vectors(model: Any, start: int, stop: int) -> np.ndarray:
    return np.asarray(model.item_vectors(torch.arange(start, stop)).float().numpy())


@torch.inference_mode()
def sample_queries(
    model: Any, dataset: PreparedDataset, history_length: int, queries: Literal["user", "event"], limit: int, seed: int
) -> np.ndarray:
    """(<= limit, D) query vectors of validation users with a history, in shuffled order."""
    found, count = [], 0
    for table in dataset.iter_tables("valid"):
        for question in questions(table, 1024, history_length, queries):
            rows = question.seen.lengths() > 0
            found.append(model.query_vectors(question.batch)[rows].float().numpy())
            count += len(found[-1])
            if count >= limit:
                break
        if count >= limit:
            break
    vectors = np.concatenate(found)[:limit]
    return np.asarray(vectors[np.random.default_rng(seed).permutation(len(vectors))])


def save_vectors(folder: str, vectors_ND: np.ndarray) -> None:
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.reshape(-1)), vectors_ND.shape[1])
    storage.write_table(storage.join(folder, "vectors.parquet"), pa.table({"vector": flat}))


def load_vectors(folder: str) -> np.ndarray:
    column = storage.read_table(storage.join(folder, "vectors.parquet"))["vector"].combine_chunks()
    return np.asarray(column.flatten().to_numpy().reshape(len(column), -1))
