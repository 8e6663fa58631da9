"""faiss: choose, build, open and search an index over item vectors. The only room that imports faiss."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from recray import storage
from recray.errors import DependencyError, ResourceError
from recray.ids import FIRST_ITEM
from recray.records import IndexRecord

_TRAIN_PER_LIST = 64  # training vectors per inverted list; faiss warns below 39
_EXACT_BELOW = 200_000  # below it exact search costs a few milliseconds a query


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise DependencyError(
            "faiss is not installed: pip install 'recray[cpu]' (or 'recray[gpu]' on a machine with an NVIDIA GPU)"
        ) from error
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    return faiss


def choose(num_items: int) -> str:
    """A faiss factory string by catalogue size (inner product)."""
    if num_items < _EXACT_BELOW:
        return "Flat"
    if num_items < 1_000_000:
        return "HNSW32"
    lists = 2 ** round(math.log2(4 * math.sqrt(num_items)))
    return f"IVF{lists},Flat" if num_items < 10_000_000 else f"IVF{lists}_HNSW32,SQ8"


def build(vectors_ND: np.ndarray, factory: str, use_gpu: str) -> tuple[Any, str]:
    """A trained index over all rows (ids 0..N-1 in order) and the device it was built on: 'gpu' or 'cpu'."""
    faiss = _faiss()
    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    if use_gpu == "always" and not gpus:
        raise ResourceError("retrieval.use_gpu = 'always', but faiss finds no GPU: install recray[gpu], or set 'auto'")
    index = faiss.index_factory(vectors_ND.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    device = "cpu"
    # get_num_gpus guards the copy: with no GPU, index_cpu_to_all_gpus gives an empty index without an error.
    if gpus and use_gpu != "never" and not factory.startswith("HNSW"):
        index, device = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index), "gpu"
    if not index.is_trained:
        lists = getattr(faiss.downcast_index(index), "nlist", 256)
        wanted = min(len(vectors_ND), max(lists * _TRAIN_PER_LIST, 10_000))
        sample = np.random.default_rng(0).choice(len(vectors_ND), wanted, replace=False)
        index.train(np.ascontiguousarray(vectors_ND[np.sort(sample)], np.float32))
    index.add(np.ascontiguousarray(vectors_ND, np.float32))
    return (faiss.index_gpu_to_cpu(index) if device == "gpu" else index), device


def settings(index: Any) -> list[dict[str, int]]:
    """The grid to sweep: nprobe, efSearch, or nothing for an exact index."""
    faiss = _faiss()
    inner = _inner(faiss, index)
    if hasattr(inner, "nprobe"):
        return [{"nprobe": n} for n in _powers(1, inner.nlist)]
    if hasattr(inner, "hnsw"):
        return [{"efSearch": n} for n in _powers(16, 1024)]
    return [{}]


def _powers(first: int, last: int) -> list[int]:
    grid = [first]
    while grid[-1] * 2 <= last:
        grid.append(grid[-1] * 2)
    return grid if grid[-1] == last else [*grid, last]


def apply(index: Any, setting: dict[str, int]) -> None:
    inner = _inner(_faiss(), index)
    if "nprobe" in setting:
        inner.nprobe = setting["nprobe"]
    if "efSearch" in setting:
        inner.hnsw.efSearch = setting["efSearch"]


def _inner(faiss: Any, index: Any) -> Any:
    index = faiss.downcast_index(index)
    while hasattr(index, "base_index") or isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.base_index if hasattr(index, "base_index") else index.index)
    return index


def serialize(index: Any) -> bytes:
    return bytes(_faiss().serialize_index(index).tobytes())


@dataclass(frozen=True)
class ItemIndex:
    """A bundle opened for search."""

    index: Any
    keys: pa.Array  # original item keys by item id
    record: IndexRecord

    @staticmethod
    def open(folder: str) -> ItemIndex:
        """Raises LineageError when the index stage never completed in `folder`."""
        record = IndexRecord.read(folder)
        data = np.frombuffer(storage.read_bytes(storage.join(folder, "index.faiss")), np.uint8)
        index = _faiss().deserialize_index(data)
        apply(index, record.setting)
        keys = storage.read_table(storage.join(folder, "ids.parquet"))["item"].combine_chunks()
        return ItemIndex(index, keys, record)

    def search(
        self, vectors_BD: np.ndarray, k: int, exclude: tuple[np.ndarray, np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Item ids (B, k) int64 and scores (B, k) float32, best first.

        `exclude` is (values, offsets): item ids that row b must not get back. Rows are
        searched in groups of like exclusion length, each for k plus what may be filtered,
        so no seen item takes a place. -1 and ids below FIRST_ITEM never come back: a row
        that the index cannot fill ends in id 0 and score -inf.
        """
        ids = np.zeros((len(vectors_BD), k), np.int64)
        scores = np.full((len(vectors_BD), k), -np.inf, np.float32)
        lengths = np.zeros(len(vectors_BD), np.int64) if exclude is None else np.diff(exclude[1])
        buckets = np.ceil(np.log2(lengths + 1)).astype(np.int64)
        for bucket in np.unique(buckets):
            rows = np.flatnonzero(buckets == bucket)
            fetch = min(self.index.ntotal, k + FIRST_ITEM + int(lengths[rows].max(initial=0)))
            found_scores, found = self.index.search(np.ascontiguousarray(vectors_BD[rows], np.float32), fetch)
            keep = found >= FIRST_ITEM
            if exclude is not None:
                values, offsets = exclude
                span = np.int64(self.record.num_items)
                local = np.repeat(np.arange(len(rows)), lengths[rows])
                mine = np.concatenate([values[offsets[r] : offsets[r + 1]] for r in rows]) if len(local) else values[:0]
                keep &= ~np.isin(np.arange(len(rows))[:, None] * span + found, local * span + mine)
            # Kept entries move left in their order; the first k stay.
            order = np.argsort(~keep, axis=1, kind="stable")[:, :k]
            filled = np.take_along_axis(keep, order, 1)
            width = order.shape[1]
            ids[rows, :width] = np.where(filled, np.take_along_axis(found, order, 1), 0)
            scores[rows, :width] = np.where(filled, np.take_along_axis(found_scores, order, 1), -np.inf)
        return ids, scores
