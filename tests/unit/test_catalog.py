"""Filters, caps and titles of lists, against plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from recray.errors import DataError
from recray.inference.catalog import Catalog
from recray.inference.filtered import AllowedSearch
from recray.loading.batch import Batch, Jagged
from recray.loading.collate import EvalQuery
from recray.models import Retriever
from recray.retrieval.exact import ExactSearch

ITEMS = 40
_RANDOM = np.random.default_rng(0)
RAW: dict[str, list[Any]] = {
    "kind": [None, None, *(("shoe", "sock", None, "hat")[one % 4] for one in range(ITEMS - 2))],
    "price": [None, None, 7.5, *(float(one) for one in _RANDOM.integers(1, 50, ITEMS - 3))],
    "year": [None, None, *(2000 + one % 9 for one in range(ITEMS - 2))],
    "tags": [None, [], *([f"t{one % 5}", f"t{one % 3}"][: one % 3] for one in range(ITEMS - 2))],
    "name": [None, None, *(f"Item {one}" for one in range(ITEMS - 2))],
}
CATALOG = Catalog(pa.table(RAW), "name")


@pytest.mark.parametrize(
    ("filters", "passes"),
    [
        ({"kind": ["shoe", "hat", "car"]}, lambda n: RAW["kind"][n] in ("shoe", "hat")),
        ({"kind": []}, lambda n: False),
        ({"price": {"max": 20}}, lambda n: RAW["price"][n] <= 20),
        ({"price": {"min": 10, "max": 20.5}, "kind": ["sock"]}, lambda n: 10 <= RAW["price"][n] <= 20.5 and RAW["kind"][n] == "sock"),
        ({"price": [7.5]}, lambda n: RAW["price"][n] == 7.5),
        ({"year": [2001, 2003]}, lambda n: RAW["year"][n] in (2001, 2003)),
        ({"tags": ["t1", "t9"]}, lambda n: "t1" in RAW["tags"][n]),
    ],
)  # fmt: skip
def test_filters(filters: dict[str, Any], passes: Any) -> None:
    assert CATALOG.allowed(filters).tolist() == [n >= 2 and bool(passes(n)) for n in range(ITEMS)]


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"colour": ["red"]}, "no feature 'colour'; they have: kind, name, price, tags, year"),
        ({"kind": "shoe"}, "filter 'kind': 'shoe' cannot be compared with values of type string"),
        ({"kind": [1]}, r"\[1\] cannot be compared with values of type string"),
        ({"year": ["x"]}, "cannot be compared with values of type int64"),
        ({"year": [2.5]}, "cannot be compared with values of type int64"),
        ({"kind": {"min": 3}}, "cannot be compared"),
        ({"price": {"least": 3}}, "cannot be compared"),
        ({"price": {"min": "a"}}, "cannot be compared"),
        ({"tags": {"max": 3}}, "cannot be compared"),
    ],
)
def test_filters_that_make_no_sense(filters: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        CATALOG.allowed(filters)


def test_caps() -> None:
    ids = np.stack([2 + _RANDOM.permutation(ITEMS - 2) for _ in range(5)])
    ids[1, 6:] = 0
    scores = _RANDOM.normal(size=ids.shape).astype(np.float32)
    found, kept = CATALOG.capped({"kind": 1, "year": 2}, ids, scores, 6)
    for row in range(5):
        expected: list[int] = []
        for one in ids[row][ids[row] > 0]:
            kinds, years = ([RAW[name][n] for n in expected] for name in ("kind", "year"))
            over = RAW["kind"][one] is not None and kinds.count(RAW["kind"][one]) >= 1
            if not over and years.count(RAW["year"][one]) < 2 and len(expected) < 6:
                expected.append(int(one))
        assert found[row][found[row] > 0].tolist() == expected
        assert kept[row, : len(expected)].tolist() == [scores[row][ids[row] == one][0] for one in expected]
    with pytest.raises(DataError, match="'tags' holds lists"):
        CATALOG.capped({"tags": 1}, ids, scores, 3)
    assert CATALOG.titles(np.array([3, 1])) == ["Item 1", None] and Catalog.empty(4).titles(np.array([2])) == [None]


def test_search_among_the_items_that_pass() -> None:
    class First(Retriever):
        def query_vectors(self, batch: Batch) -> torch.Tensor:
            return torch.eye(8)[batch.user_B]

        def item_vectors(self, item_ids: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

    vectors = torch.randn(ITEMS, 8, generator=torch.Generator().manual_seed(0))
    keep = CATALOG.allowed({"kind": ["shoe", "sock"]})
    seen = Jagged.from_lengths(torch.tensor([2, 3, 6, 5, 7]), torch.tensor([3, 0, 2]))
    batch, zeros = Batch(torch.tensor([1, 4, 6]), seen), torch.zeros(4, dtype=torch.int64)
    query = EvalQuery(batch, seen, Jagged(zeros[:0], zeros), zeros[1:])
    search = AllowedSearch.of(ExactSearch(First(), vectors), keep)
    for exclude in (False, True):
        ids, scores = search.recommend(query, 30, exclude)
        for row, user in enumerate((1, 4, 6)):
            gone = set(seen.rows(row, row + 1).values.tolist()) if exclude else set()
            there = [n for n in range(ITEMS) if keep[n] and n not in gone]
            expected = sorted(there, key=lambda n: -float(vectors[n, user]))
            assert ids[row][: len(there)].tolist() == expected and not ids[row][len(there) :].any()
            np.testing.assert_allclose(scores[row][: len(there)], vectors[expected, user], rtol=1e-6)
