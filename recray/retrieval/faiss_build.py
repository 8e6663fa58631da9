"""Train and fill a faiss index. As a script it does so in a separate process: `faiss_build.py VECTORS FACTORY GPU OUT`.

Some factory strings make faiss abort, crash or never return (NSG16 over 50 items, HNSW1, NSG0). In a separate process
that is an exit code. Nothing of recray is imported, so that the process starts fast.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np

_TRAIN_PER_LIST = 64  # training vectors per inverted list; faiss warns below 39
REFUSED = 3  # exit code: faiss raised an error, whose text is the last line of stderr


def build(vectors_ND: np.ndarray, factory: str, gpu: str) -> tuple[Any, str]:
    """A trained index over all rows (ids 0..N-1 in order), and where it was built: "gpu" or "cpu".

    gpu: "never", or "auto" and "always" where faiss has a GPU; with "auto" an index that no GPU supports is built on the
    CPU. Raises RuntimeError, AssertionError or MemoryError, as faiss does, for what cannot be built, searched or stored.
    """
    import faiss

    faiss.omp_set_num_threads(os.cpu_count() or 1)
    index, device = faiss.index_factory(vectors_ND.shape[1], factory, faiss.METRIC_INNER_PRODUCT), "cpu"
    # faiss copies an HNSW graph to a GPU as a flat index.
    if gpu != "never" and not factory.startswith("HNSW"):
        try:
            index, device = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index), "gpu"
        except RuntimeError:
            if gpu == "always":
                raise
    coded = inner(faiss, index)
    if hasattr(coded, "storage"):  # of a graph
        coded = faiss.downcast_index(coded.storage)
    if hasattr(coded, "do_polysemous_training"):
        coded.do_polysemous_training = False  # takes most of the time, for a kind of search that is not used
    if not index.is_trained:
        lists = getattr(faiss.downcast_index(index), "nlist", 256)
        wanted = min(len(vectors_ND), max(lists * _TRAIN_PER_LIST, 10_000))
        sample = np.random.default_rng(0).choice(len(vectors_ND), wanted, replace=False)
        index.train(np.ascontiguousarray(vectors_ND[np.sort(sample)], np.float32))
    index.add(np.ascontiguousarray(vectors_ND, np.float32))
    index = faiss.index_gpu_to_cpu(index) if device == "gpu" else index
    index.search(np.ascontiguousarray(vectors_ND[:1], np.float32), 1)
    return index, device


def inner(faiss: Any, index: Any) -> Any:
    """The index below transforms and refinements, which has the search settings."""
    index = faiss.downcast_index(index)
    while hasattr(index, "base_index") or isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.base_index if hasattr(index, "base_index") else index.index)
    return index


def _main(vectors: str, factory: str, gpu: str, out: str) -> int:
    import faiss

    try:
        index, device = build(np.load(vectors, mmap_mode="r"), factory, gpu)
        faiss.write_index(index, out)
        faiss.read_index(out)  # some kinds can be written and not be read
    except (RuntimeError, AssertionError, MemoryError) as error:
        sys.stderr.write("\n" + " ".join(str(error).split()) + "\n")
        return REFUSED
    sys.stdout.write(device)
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
