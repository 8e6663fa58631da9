"""Exported programs compute what the models compute: every shipped model, batches and histories of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recray import registry
from recray.config import parse_config
from recray.ids import FIRST_ITEM
from recray.inference.programs import (
    ITEM,
    QUERY,
    RANKER,
    ExportedRanker,
    ExportedRetriever,
    export_ranker,
    export_retriever,
)
from recray.loading.batch import Batch, ItemTable, Jagged
from recray.models import Ranker, Retriever, build_model
from recray.records import DatasetRecord, Feature

ITEMS, USERS, LENGTH = 40, 20, 8
FEATURES = [
    Feature(name="country", role="user", kind="categorical", cardinality=5),
    Feature(name="age", role="user", kind="numeric"),
    Feature(name="tags", role="user", kind="list", cardinality=9),
    Feature(name="hour", role="context", kind="categorical", cardinality=26),
    Feature(name="price.usd", role="context", kind="numeric"),
    Feature(name="brand", role="item", kind="categorical", cardinality=7),
    Feature(name="price", role="item", kind="numeric"),
    Feature(name="genres", role="item", kind="list", cardinality=6),
]
BY_FAMILY = {
    family: [n for n in registry.names("model") if registry.load("model", n).Options.family == family]
    for family in ("retriever", "ranker")
}


def _lists(lengths: list[int], high: int) -> Jagged:
    return Jagged.from_lengths(torch.randint(1, high, (sum(lengths),)), torch.tensor(lengths))


def _model(name: str, features: bool, **options: Any) -> tuple[Retriever | Ranker, DatasetRecord]:
    torch.manual_seed(3)
    record = DatasetRecord(
        fingerprint="",
        num_items=ITEMS,
        num_users=USERS,
        counts={},
        shards={},
        seed=0,
        features=FEATURES if features else [],
    )
    columns: dict[str, Any] = {
        "brand": torch.randint(0, 7, (ITEMS,)),
        "price": torch.randn(ITEMS),
        "genres": _lists([number % 4 for number in range(ITEMS)], 6),
    }
    config = parse_config({"data": {"path": "x"}, "model": {"name": name, "history_length": LENGTH, **options}})
    model = build_model(config, record, ItemTable(torch.ones(ITEMS), columns if features else {})).eval()
    for parameter in model.parameters():  # what starts at 0 or 1 must not hide a difference
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model, record


def _batch(lengths: list[int], features: bool) -> Batch:
    rows = len(lengths)
    user = {
        "country": torch.randint(0, 5, (rows,)),
        "age": torch.randn(rows),
        "tags": _lists([number % 3 for number in range(rows)], 9),
    }
    context = {"hour": torch.randint(0, 26, (rows,)), "price.usd": torch.randn(rows)}
    return Batch(
        torch.randint(0, USERS, (rows,)),
        _lists(lengths, ITEMS),
        torch.randint(1, ITEMS, (rows,)),
        user_features=user if features else {},  # type: ignore[arg-type]
        context=context if features else {},  # type: ignore[arg-type]
    )


BATCHES = ([3, 0, 8, 1, 5, 2], [0], [1], [8], [0, 0, 0], [number % 9 for number in range(300)])


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "options", "features"),
    [(name, {}, True) for name in BY_FAMILY["retriever"]]
    + [("two_tower", {"history": "others", "item_bias": True, "normalize": True, "hidden": [8]}, True)]
    + [("two_tower", {"pooling": "none"}, False), ("sasrec", {"feed_forward": "gated", "normalize": True}, False)],
)
def test_retrievers(name: str, options: dict[str, Any], features: bool) -> None:
    model, record = _model(name, features, **options)
    assert isinstance(model, Retriever)
    columns = {one.column: one for one in record.features if one.role != "item"}
    expected = [(batch, model.query_vectors(batch)) for batch in (_batch(one, features) for one in BATCHES)]
    vectors = model.item_vectors(torch.arange(ITEMS))
    found = export_retriever(model, columns, LENGTH)
    exported = ExportedRetriever(found[QUERY], found[ITEM])
    for batch, wanted in expected:
        torch.testing.assert_close(exported.query_vectors(batch), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(exported.item_vectors(torch.arange(ITEMS)), vectors, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(exported.item_vectors(torch.tensor([5])), vectors[[5]], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "options", "features"),
    [(name, {}, True) for name in BY_FAMILY["ranker"]]
    + [("din", {"min_history": 3}, False), ("dcn_v2", {"structure": "stacked", "history": "none"}, True)]
    + [("dlrm", {"dim": 8}, False)],
)
def test_rankers(name: str, options: dict[str, Any], features: bool) -> None:
    model, record = _model(name, features, **options)
    assert isinstance(model, Ranker)
    columns = {one.column: one for one in record.features if one.role != "item"}
    expected = [(batch, model.logits(batch)) for batch in (_batch(one, features) for one in BATCHES)]
    exported = ExportedRanker(export_ranker(model, columns, LENGTH, record)[RANKER])
    for batch, wanted in expected:
        torch.testing.assert_close(exported.logits(batch), wanted, rtol=1e-5, atol=1e-5)


def test_items_that_the_ranker_does_not_know_are_unknown() -> None:
    model, record = _model("wide_deep", False)
    assert isinstance(model, Ranker)
    exported = ExportedRanker(export_ranker(model, {}, LENGTH, record)[RANKER])
    batch = _batch([2, 2], False)
    new = Batch(batch.user_B, Jagged(batch.history.values.clone(), batch.history.offsets), torch.tensor([ITEMS + 3, 5]))
    new.history.values[0] = ITEMS
    known = Batch(batch.user_B, Jagged(new.history.values.clone(), batch.history.offsets), torch.tensor([1, 5]))
    known.history.values[0] = FIRST_ITEM - 1
    with torch.inference_mode():
        torch.testing.assert_close(exported.logits(new), model.logits(known), rtol=1e-5, atol=1e-5)
