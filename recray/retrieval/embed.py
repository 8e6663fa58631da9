"""Item and user vectors out of a checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from recray import storage
from recray.data.dataset import PreparedDataset
from recray.loading.collate import eval_queries
from recray.records import CheckpointRecord
from recray.training import checkpoint

_CHUNK = 65_536  # items embedded at a time
_TASK = 1 << 18  # items of a task, which opens the checkpoint once
_PARALLEL_ABOVE = 200_000  # below it, starting workers takes longer than the vectors
_MAPPED_ABOVE = 1 << 27  # numbers (512 MB) of a catalogue's vectors from which on they lie in a file


def item_vectors(checkpoint_uri: str, num_items: int, parallel: bool) -> np.ndarray:
    """(N, D) float32, row i is item id i; by Ray Data tasks for large catalogues when `parallel`.

    A task embeds items of one piece of the checkpoint's tables, so that it opens that piece only; vectors of a large
    catalogue lie in a file that is mapped, not in the memory of this process.
    """
    step = max(1, CheckpointRecord.read(checkpoint_uri).pieces)
    shares = [range(piece, num_items, step) for piece in range(min(step, num_items))]
    tasks = [share[at : at + _TASK] for share in shares for at in range(0, len(share), _TASK)]
    by_tasks = parallel and num_items >= _PARALLEL_ABOVE
    out: np.ndarray | None = None
    for ids, vectors in _by_tasks(checkpoint_uri, tasks) if by_tasks else _embedded(checkpoint_uri, tasks):
        out = _room(num_items, vectors.shape[1]) if out is None else out
        out[ids.start : ids.stop : ids.step] = vectors
    assert out is not None
    return out


def _room(rows: int, width: int) -> np.ndarray:
    if rows * width < _MAPPED_ABOVE:
        return np.empty((rows, width), np.float32)
    with tempfile.TemporaryFile() as file:  # the mapping keeps it
        return np.memmap(file, np.float32, "w+", shape=(rows, width))


def _embedded(checkpoint_uri: str, tasks: list[range]) -> Iterator[tuple[range, np.ndarray]]:
    model, _ = checkpoint.load_model(checkpoint_uri)
    for ids in tasks:
        for at in range(0, len(ids), _CHUNK):
            yield ids[at : at + _CHUNK], _vectors(model, ids[at : at + _CHUNK])


def _by_tasks(checkpoint_uri: str, tasks: list[range]) -> Iterator[tuple[range, np.ndarray]]:
    import ray.data

    rows = [{"start": ids.start, "stop": ids.stop, "step": ids.step} for ids in tasks]
    work = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _embed_task,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"checkpoint_uri": checkpoint_uri},
    )
    for table in work.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row, flat in zip(table.select(["start", "stop", "step"]).to_pylist(), table["vectors"], strict=True):
            ids = range(row["start"], row["stop"], row["step"])
            yield ids, flat.values.to_numpy().reshape(len(ids), -1)


def _embed_task(batch: pa.Table, checkpoint_uri: str) -> Iterator[pa.Table]:
    tasks = [range(row["start"], row["stop"], row["step"]) for row in batch.to_pylist()]
    for ids, vectors in _embedded(checkpoint_uri, tasks):
        where = {"start": [ids.start], "stop": [ids.stop], "step": [ids.step]}
        yield pa.table(where | {"vectors": pa.array([vectors.reshape(-1)], pa.large_list(pa.float32()))})


@torch.inference_mode()
def _vectors(model: Any, ids: range) -> np.ndarray:
    return np.asarray(model.item_vectors(torch.arange(ids.start, ids.stop, ids.step)).float().numpy())


@torch.inference_mode()
def sample_queries(
    model: Any, dataset: PreparedDataset, history_length: int, queries: Literal["user", "event"], limit: int, seed: int
) -> np.ndarray:
    """(<= limit, D) query vectors of validation users with a history, in shuffled order."""
    found, count = [], 0
    for table in dataset.iter_tables("valid"):
        for question in eval_queries(table, 1024, history_length, queries):
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
