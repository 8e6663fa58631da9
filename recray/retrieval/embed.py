"""Item vectors of a checkpoint, computed or read back, and query vectors for the recall sweep."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recray import progress, storage
from recray.artifacts import Artifact
from recray.cluster import runtime
from recray.config import Config, ScalingConfig
from recray.data.dataset import PreparedDataset
from recray.digests import FileDigest
from recray.loading.collate import eval_queries
from recray.models import Retriever
from recray.records import CheckpointRecord
from recray.retrieval.exact import query_vectors
from recray.training import checkpoint

_CHUNK = 65_536  # items embedded or read at a time
_TASK = 1 << 18  # items per task, which loads the model once
_PARALLEL_ABOVE = 200_000  # items; with fewer, starting workers takes longer than computing the vectors
_MAPPED_ABOVE = 1 << 27  # numbers (512 MB); larger arrays are kept in a mapped file


def item_vectors(
    source: Artifact[CheckpointRecord], model: Retriever, num_items: int, scaling: ScalingConfig | None = None
) -> np.ndarray:
    """(N, D) float32, row i is item id i. Computed with `model`, or by Ray Data tasks for a large catalogue if `scaling` is given.

    Items are divided as the checkpoint's sharded tables are, so that a task opens one file of them only.
    """
    step = max(1, source.record.pieces)
    shares = [range(piece, num_items, step) for piece in range(min(step, num_items))]
    tasks = [share[at : at + _TASK] for share in shares for at in range(0, len(share), _TASK)]
    if scaling is not None and num_items >= _PARALLEL_ABOVE:
        runtime.start(scaling)
        found = _by_tasks(source.uri, tasks)
    else:
        found = _embed(model, tasks)
    out: np.ndarray | None = None
    chunks = sum(-(-len(task) // _CHUNK) for task in tasks)
    for ids, vectors in progress.track(found, "index", "item vectors", chunks):
        out = _allocate(num_items, vectors.shape[1]) if out is None else out
        out[ids.start : ids.stop : ids.step] = vectors
    assert out is not None
    return out


def _allocate(rows: int, width: int) -> np.ndarray:
    if rows * width < _MAPPED_ABOVE:
        return np.empty((rows, width), np.float32)
    with tempfile.TemporaryFile() as file:  # the mapping keeps the deleted file open
        return np.memmap(file, np.float32, "w+", shape=(rows, width))


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
    model, _ = checkpoint.load_model(checkpoint_uri)
    assert isinstance(model, Retriever)
    for ids, vectors in _embed(model, tasks):
        where = {"start": [ids.start], "stop": [ids.stop], "step": [ids.step]}
        yield pa.table(where | {"vectors": pa.array([vectors.reshape(-1)], pa.large_list(pa.float32()))})


def _embed(model: Retriever, tasks: list[range]) -> Iterator[tuple[range, np.ndarray]]:
    for task in tasks:
        for at in range(0, len(task), _CHUNK):
            ids = task[at : at + _CHUNK]
            with torch.inference_mode():
                vectors = model.item_vectors(torch.arange(ids.start, ids.stop, ids.step))
            yield ids, vectors.float().numpy()


def sample_queries(model: Retriever, dataset: PreparedDataset, config: Config) -> np.ndarray:
    """(<= retrieval.sweep_users, D) vectors of queries that have a history, in shuffled order: of the validation split or,
    where it has none, of training users after their last event."""
    vectors = _queries(model, dataset, config, "valid", config.evaluation.queries)
    if not len(vectors):
        vectors = _queries(model, dataset, config, "train", "next")
    return np.asarray(vectors[np.random.default_rng(config.run.seed).permutation(len(vectors))])


def _queries(
    model: Retriever, dataset: PreparedDataset, config: Config, split: str, kind: Literal["user", "event", "next"]
) -> np.ndarray:
    limit = config.retrieval.sweep_users
    found, count = [np.empty((0, config.model.dim), np.float32)], 0
    for table in dataset.iter_tables(split):
        for query in eval_queries(table, 1024, config.model.history_length, kind):
            vectors = query_vectors(model, query)[query.seen.lengths() > 0].numpy()
            found.append(vectors)
            count += len(vectors)
            if count >= limit:
                return np.concatenate(found[1:])[:limit]
    return np.concatenate(found[1:] if len(found) > 1 else found)


def save_vectors(folder: str, vectors_ND: np.ndarray) -> None:
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.reshape(-1)), vectors_ND.shape[1])
    storage.write_table(storage.join(folder, "vectors.parquet"), pa.table({"vector": flat}))


def load_vectors(folder: str, num_items: int, digest: FileDigest | None = None) -> np.ndarray:
    """(N, D) float32: the vectors that the index in `folder` was built from, bit for bit.

    Raises StorageError if the file does not have this digest.
    """
    if digest is not None:
        digest.check(storage.join(folder, "vectors.parquet"))
    out: np.ndarray | None = None
    at = 0
    with storage.local_file(storage.join(folder, "vectors.parquet")) as path, pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_CHUNK):
            vectors = batch.column(0).flatten().to_numpy().reshape(len(batch), -1)
            out = _allocate(num_items, vectors.shape[1]) if out is None else out
            out[at : at + len(vectors)] = vectors
            at += len(vectors)
    assert out is not None and at == num_items
    return out
