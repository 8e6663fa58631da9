"""Choose, build, open and search a faiss index over item vectors. The only module that imports faiss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from recray import storage
from recray.cluster import cpus
from recray.errors import DependencyError, ResourceError
from recray.ids import FIRST_ITEM, PAD
from recray.records import IndexRecord

_TRAIN_PER_LIST = 64  # training vectors per inverted list; faiss warns below 39
_EXACT_BELOW = 200_000  # items; with fewer, exact search takes a few milliseconds per query


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise DependencyError(
            "faiss is not installed: pip install 'recray[cpu]' (or 'recray[gpu]' on a machine with an NVIDIA GPU)"
        ) from error
    faiss.omp_set_num_threads(cpus.available())
    return faiss


def choose(num_items: int) -> str:
    """The faiss factory string for a catalogue of this size.

    Flat (exact) below 200,000 items, HNSW below a million, then inverted lists: about 4 sqrt(N) of them, from 10 million
    items on with 8-bit codes and an HNSW quantizer.
    """
    if num_items < _EXACT_BELOW:
        return "Flat"
    if num_items < 1_000_000:
        return "HNSW32"
    lists = 2 ** round(math.log2(4 * math.sqrt(num_items)))
    return f"IVF{lists},Flat" if num_items < 10_000_000 else f"IVF{lists}_HNSW32,SQ8"


def build(vectors_ND: np.ndarray, factory: str, use_gpu: str) -> tuple[Any, str]:
    """A trained index over all rows (ids 0..N-1 in order), and where it was built: 'gpu' or 'cpu'.

    Raises ResourceError if use_gpu is "always" and faiss finds no GPU.
    """
    faiss = _faiss()
    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    if use_gpu == "always" and not gpus:
        raise ResourceError("retrieval.use_gpu = 'always', but faiss finds no GPU: install recray[gpu], or set 'auto'")
    index = faiss.index_factory(vectors_ND.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    device = "cpu"
    # Without a GPU, index_cpu_to_gpu would return an empty index instead of an error.
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
    """Search settings to sweep: nprobe or efSearch; a single empty one for an exact index."""
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
    """An index of the index stage, opened for search."""

    index: Any
    keys: pa.Array  # original item keys by item id
    record: IndexRecord

    @staticmethod
    def open(folder: str) -> ItemIndex:
        """Raises LineageError if the index stage never completed in `folder`."""
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

        `exclude` is (values, offsets): item ids that row b must not contain. faiss cannot leave them out, so each row asks
        for k more results than it may lose. Rows are searched in groups whose lists of excluded items have about the same
        length (powers of 2). A row that the index cannot fill ends in PAD and -inf.
        """
        ids = np.full((len(vectors_BD), k), PAD, np.int64)
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
            # A stable sort moves the kept entries to the left in their order.
            order = np.argsort(~keep, axis=1, kind="stable")[:, :k]
            filled = np.take_along_axis(keep, order, 1)
            width = order.shape[1]
            ids[rows, :width] = np.where(filled, np.take_along_axis(found, order, 1), PAD)
            scores[rows, :width] = np.where(filled, np.take_along_axis(found_scores, order, 1), -np.inf)
        return ids, scores
