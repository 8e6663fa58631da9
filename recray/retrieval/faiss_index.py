"""Choose, build, open and search a faiss index over item vectors. Only this module and faiss_build import faiss."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from recray import digests, storage
from recray.cluster import cpus
from recray.data.dataset import read_verified
from recray.errors import ConfigError, DependencyError, LineageError, ResourceError
from recray.ids import FIRST_ITEM, PAD
from recray.records import IndexRecord
from recray.retrieval import faiss_build

_EXACT_BELOW = 200_000  # items; with fewer, exact search takes a few milliseconds per query
# Factory strings that are built in this process, among them all that `choose` returns.
_PLAIN = re.compile(r"Flat|SQ8|HNSW(?:[4-9]|[1-9]\d)|IVF[1-9]\d*(?:_HNSW32)?,(?:Flat|SQ8)")
# Time limit of a build in another process. Graphs take about a millisecond per item and core.
_CHILD_SECONDS, _CHILD_SECONDS_PER_ITEM = 120.0, 0.005


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


def check(factory: str) -> None:
    """Raise ConfigError for a factory string that faiss cannot parse, whatever the vectors are."""
    if factory == "auto" or _PLAIN.fullmatch(factory):
        return
    faiss = _faiss()
    small = re.sub(r"(IVF|HNSW|NSG)\d+", r"\g<1>16", factory)  # large numbers allocate memory
    try:
        faiss.index_factory(16, small, faiss.METRIC_INNER_PRODUCT)
    except (RuntimeError, MemoryError) as error:
        if "could not parse" in str(error) or "stoi" in str(error):
            raise _refusal(factory, str(error).replace(small, factory)) from None


def build(vectors_ND: np.ndarray, factory: str, use_gpu: str) -> tuple[Any, str]:
    """A trained index over all rows (ids 0..N-1 in order), and where it was built: 'gpu' or 'cpu'.

    Raises ConfigError for a factory string that faiss refuses for these vectors, or that would end this process: all but
    the plainest are built in another one. Raises ResourceError if use_gpu is "always" and faiss finds no GPU.
    """
    faiss = _faiss()
    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    if use_gpu == "always" and not gpus:
        raise ResourceError("retrieval.use_gpu = 'always', but faiss finds no GPU: install recray[gpu], or set 'auto'")
    lists = re.match(r"(?:.*,)?IVF(\d+)", factory)
    if lists and int(lists[1]) > len(vectors_ND):
        raise _refusal(factory, f"it has {int(lists[1]):,} lists, more than the {len(vectors_ND):,} vectors to index")
    gpu = use_gpu if gpus else "never"  # without a GPU, faiss would return an empty index instead of an error
    if not _PLAIN.fullmatch(factory):
        return _in_child(vectors_ND, factory, gpu)
    try:
        return faiss_build.build(vectors_ND, factory, gpu)
    except (RuntimeError, AssertionError, MemoryError) as error:
        raise _refusal(factory, str(error)) from None


def _in_child(vectors_ND: np.ndarray, factory: str, gpu: str) -> tuple[Any, str]:
    limit = _CHILD_SECONDS + len(vectors_ND) * _CHILD_SECONDS_PER_ITEM
    with tempfile.TemporaryDirectory() as folder:
        vectors, out = os.path.join(folder, "vectors.npy"), os.path.join(folder, "index.faiss")
        np.save(vectors, vectors_ND)
        command = [sys.executable, "-P", faiss_build.__file__, vectors, factory, gpu, out]
        path = os.pathsep.join(filter(None, sys.path))
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=limit, env={**os.environ, "PYTHONPATH": path}
            )
        except subprocess.TimeoutExpired:
            raise _refusal(factory, f"building it did not end within {limit:,.0f} s") from None
        told = (done.stderr.strip().splitlines() or [""])[-1]
        if done.returncode == faiss_build.REFUSED:
            raise _refusal(factory, told)
        if done.returncode:
            raise _refusal(factory, f"building it ended the process ({_ending(done.returncode)}): {told}")
        return _faiss().read_index(out), done.stdout


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _refusal(factory: str, error: str) -> ConfigError:
    """faiss says: Error in <function> at <file>:<line>: Error: '<condition>' failed: <explanation>"""
    condition, _, explanation = error.partition(" failed: ")
    said = explanation or condition.rpartition(".cpp:")[2].partition(": ")[2] or condition
    if "METRIC_L2" in said:
        said = f"it has no inner products, which models score with ({said})"
    return ConfigError(
        f"retrieval.index = '{factory}': faiss cannot build this index over these vectors: {said.strip()}. "
        f"Use 'auto', 'Flat', 'HNSW32', or another factory string of faiss"
    )


def settings(index: Any) -> list[dict[str, int]]:
    """Search settings to sweep: nprobe or efSearch; a single empty one for an exact index."""
    faiss = _faiss()
    inner = faiss_build.inner(faiss, index)
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
    inner = faiss_build.inner(_faiss(), index)
    if "nprobe" in setting:
        inner.nprobe = setting["nprobe"]
    if "efSearch" in setting:
        inner.hnsw.efSearch = setting["efSearch"]


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
        """Raises LineageError if the index stage never completed in `folder`, StorageError if a file of it is damaged."""
        record = IndexRecord.read(folder)
        digests.check_present(folder, record.files)
        data = record.files["index.faiss"].read(storage.join(folder, "index.faiss"))
        index = _faiss().deserialize_index(np.frombuffer(data, np.uint8))
        apply(index, record.setting)
        keys = read_verified(storage.join(folder, "ids.parquet"), record.files["ids.parquet"])["item"].combine_chunks()
        if not index.ntotal == len(keys) == record.num_items:
            raise LineageError(
                f"{folder} has {index.ntotal:,} vectors and {len(keys):,} keys of {record.num_items:,} items: index again"
            )
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
