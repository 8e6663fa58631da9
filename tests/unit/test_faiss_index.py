"""Every factory string is measured by what it truly finds, or refused in words before anything is written."""

import numpy as np
import pytest

from recray.errors import ConfigError
from recray.retrieval import faiss_index
from recray.retrieval.recall_sweep import sweep

pytest.importorskip("faiss")
K, DIM, ITEMS = 20, 16, 1500

_FACTORIES = [
    *("Flat", "SQ8", "SQ4", "SQfp16", "PQ8", "OPQ2,PQ8x4", "PCA8,Flat", "L2norm,Flat", "IVF16,Flat", "IVF16,SQ8"),
    *("IVF16,PQ8", "IVF16,PQ8,RFlat", "HNSW16", "HNSW16,SQ8", "NSG16", "RaBitQ", "PRQ2x2x4"),
]


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(sigma=0.4, size=(ITEMS, 1))
    return (rng.normal(size=(ITEMS, DIM)) * lengths).astype(np.float32)


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(80, DIM)).astype(np.float32)


@pytest.mark.parametrize("factory", _FACTORIES)
def test_recall_is_the_share_of_returned_items_that_belong_there(
    factory: str, vectors: np.ndarray, queries: np.ndarray
) -> None:
    index, _ = faiss_index.build(vectors, factory, "never")
    chosen, recall, curve = sweep(index, vectors, queries, K, 0.9)
    faiss_index.apply(index, chosen.setting)
    report = queries[len(queries) // 2 :]
    exact = report.astype(np.float64) @ vectors.astype(np.float64).T
    exact[:, :2] = -np.inf  # reserved ids
    _, found = index.search(report, K + 2)
    hits = 0
    for row, ids in zip(exact, found.tolist(), strict=True):
        best = set(np.argsort(-row)[:K].tolist())
        hits += len(best & set([one for one in ids if one >= 2][:K]))
    assert recall == pytest.approx(hits / (K * len(report)), abs=1e-6)
    assert all(0 <= point.recall <= 1 for point in curve)
    assert (recall == 1.0) or factory != "Flat"


@pytest.mark.parametrize(
    ("factory", "why"),
    [
        ("Foo", "could not parse index string Foo"),
        ("", "could not parse"),
        ("IVF16", "could not parse"),
        ("IVF0,Flat", "nprobe"),
        ("IVF99999999999,Flat", "99,999,999,999 lists, more than the 122 vectors"),
        ("IVF256,Flat", "256 lists, more than the 122 vectors"),
        ("OPQ4,IVF4096,PQ8", "4,096 lists, more than the 122 vectors"),
        ("PQ8", r"training points \(122\) should be at least as large as number of clusters \(256\)"),
        ("PQ3", "multiple of the number of subquantizers"),
        ("IDMap,Flat", "add does not make sense"),
        ("LSH", "no inner products"),
        ("ZnLattice2x2_4", "deserialization"),
        ("HNSW99999999", "bad_alloc|SIG"),
        ("HNSW0", "ended the process .SIGABRT.: Faiss assertion"),
        ("HNSW1", "ended the process .SIGSEGV."),
    ],
)
def test_what_faiss_cannot_build_is_a_config_error(factory: str, why: str, vectors: np.ndarray) -> None:
    with pytest.raises(ConfigError, match=rf"retrieval.index = '{factory}': .*({why})") as error:
        faiss_index.build(vectors[:122], factory, "never")
    assert "Error in" not in str(error.value)


def test_a_build_that_never_ends_is_stopped(vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_index, "_CHILD_SECONDS", 3.0)
    with pytest.raises(ConfigError, match=r"retrieval.index = 'NSG0': .* did not end within 4 s"):
        faiss_index.build(vectors[:122], "NSG0", "never")


def test_a_string_that_faiss_cannot_parse_is_refused_without_vectors() -> None:
    for factory in (
        "auto",
        "Flat",
        "IVF65536,PQ8",
        "OPQ16_64,IVF262144_HNSW32,PQ16x4fsr",
        "PQ3",
        "LSH",
        "HNSW99999999",
    ):
        faiss_index.check(factory)
    for factory in ("Foo", "", "IVF-1,Flat", "flat", "PQ99999999999"):
        with pytest.raises(ConfigError, match=rf"retrieval.index = '{factory}'"):
            faiss_index.check(factory)
