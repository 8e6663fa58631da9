"""Which columns are features of which kind, and what is refused before events are read."""

from datetime import UTC, date, datetime

import numpy as np
import pyarrow as pa
import pytest

from recray.config import DataConfig
from recray.data import features, kinds
from recray.data.kinds import FeatureColumns
from recray.data.sources import base
from recray.data.sources.base import Source
from recray.errors import DataError

KEYS = {"user": pa.int64(), "item": pa.int64()}
ROWS = 10
DAYS = [date(2020, 1, 1 + i % 3) for i in range(ROWS)]
COLUMNS = {
    "item_id": list(range(ROWS)),
    "title": [f"title {i}" for i in range(ROWS)],
    "brand": ["a", "b"] * 5,
    "new": [True, False] * 5,
    "year": [1999, 2000] * 5,
    "price": [float(i) for i in range(ROWS)],
    "released": DAYS,
    "genres": [["x"]] * ROWS,
    "vector": pa.array([[0.5, 1.5]] * ROWS, pa.list_(pa.float32(), 2)),
    "thumbnail": pa.array([b"\xff\xd8"] * ROWS),
    "nested": [{"a": 1}] * ROWS,
    "nothing": [None] * ROWS,
}


def choose(table: pa.Table | None = None, types: dict[str, pa.DataType] | None = None, **data) -> FeatureColumns:
    items = None if table is None else base.keyed_table(table, "item_id", "item", "items.parquet")
    return kinds.choose(DataConfig.model_validate(data), Source(None, 0, "", items=items), KEYS | (types or {}))  # type: ignore[arg-type]


def test_kinds_are_inferred_and_the_rest_is_left_out_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "recray")
    found = choose(pa.table(COLUMNS))
    assert {name: config.kind for name, config in found.item.items()} == {
        **dict.fromkeys(["brand", "new", "year"], "categorical"),
        **dict.fromkeys(["price", "released"], "numeric"),
        "genres": "list",
    }
    assert found.items is not None and found.items.column_names == ["item", *(f"item_{name}" for name in found.item)]
    for reason in (
        "'title' (10 distinct values in 10 rows)",
        "'vector' (fixed_size_list<element: float>[2] is a vector, not a list of categories)",
        "'thumbnail' (binary, ",
        "'nested' (struct<a: int64> is no type of a feature)",
        "'nothing' (it holds nulls only)",
    ):
        assert reason in caplog.text.replace("item: float", "element: float")


def test_declared_columns_only_are_converted() -> None:
    found = choose(pa.table(COLUMNS), item_features={"title": {"kind": "categorical"}})
    assert list(found.item) == ["title"]
    assert found.items is not None and found.items.column_names == ["item", "item_title"]


def test_any_name_is_a_feature() -> None:
    names = ["item", "count", "user", "label", "time", "a.b", "two words", "a\nb", "颜色", "", "item_id "]
    table = pa.table({"item_id": [1, 2], **{name: [5, 5] for name in names}})
    found = choose(table)
    assert list(found.item) == names and found.items is not None
    assert found.items["item"].to_pylist() == [1, 2] and found.items["item_item"].to_pylist() == [5, 5]


@pytest.mark.parametrize(
    ("kind", "values", "takes"),
    [
        ("numeric", ["1.5", ""], "takes numbers, .*the column is string: convert it, or declare kind 'categorical'"),
        ("numeric", [[1]], "takes numbers, .*the column is list<.*int64>: convert it, or declare kind 'list'"),
        ("numeric", [{"a": 1}], "the column is struct<a: int64>: convert it, or leave it out"),
        ("categorical", [[1]], "takes strings, .*or declare kind 'list'"),
        ("list", ["a|b"], "takes lists of strings or integers, .*the column is string.*kind 'categorical'"),
        ("list", [1.5], "the column is double: convert it, or declare kind 'numeric'"),
        ("list", [[1.5]], "the column is list<.*double>: convert it, or leave it out"),
    ],
)
@pytest.mark.parametrize("role", ["item", "context"])
def test_a_kind_that_the_type_does_not_have(kind: str, values: list, takes: str, role: str) -> None:
    column = pa.array(values)
    declared = {f"{role}_features": {"f": {"kind": kind}}}
    with pytest.raises(DataError, match=rf"^data.{role}_features.f: kind '{kind}' {takes[:0]}.*{takes}$"):
        if role == "item":
            choose(pa.table({"item_id": range(len(values)), "f": column}), **declared)
        else:
            choose(types={"context_f": column.type}, columns={"context": ["f"]}, **declared)


@pytest.mark.parametrize(
    ("kind", "type"),
    [
        *[("numeric", one) for one in (pa.int8(), pa.float16(), pa.bool_(), pa.decimal128(9, 2), pa.timestamp("ns"), pa.null())],
        *[("categorical", one) for one in (pa.string(), pa.int64(), pa.float64(), pa.bool_(), pa.date32(), pa.null())],
        *[("list", one) for one in (pa.list_(pa.string()), pa.large_list(pa.int8()), pa.list_(pa.int64(), 3), pa.null())],
        ("categorical", pa.dictionary(pa.int32(), pa.string())),
        ("list", pa.list_(pa.dictionary(pa.int32(), pa.string()))),
    ],
)  # fmt: skip
def test_a_kind_that_the_type_has(kind: str, type: pa.DataType) -> None:
    choose(types={"context_f": type}, columns={"context": ["f"]}, context_features={"f": {"kind": kind}})


def test_all_problems_at_once() -> None:
    table = pa.table({"item_id": ["x", "y"], "Brand": ["a", "b"], "price": ["1", "2"]})
    with pytest.raises(DataError) as caught:
        choose(
            table,
            {"context_hour": pa.list_(pa.int64())},
            columns={"context": ["hour", "device"]},
            context_features={"hour": {"kind": "numeric"}, "Hour": {"kind": "numeric"}},
            item_features={"brand": {"kind": "categorical"}, "price": {"kind": "numeric"}},
            user_features={"age": {"kind": "numeric"}},
        )
    text = str(caught.value)
    assert text.startswith("7 columns cannot be used as configured:\n  - ")
    for part in (
        "context feature 'Hour' is not read from the log: name it in data.columns.context (['hour', 'device']) (did you mean 'hour'?)",
        "data.context_features.hour: kind 'numeric' takes",
        "data.columns.context names 'device', but the source gives no column 'context_device'",
        "item ids are int64 in the log but string in data.items",
        "the item table has no column 'brand' (did you mean 'Brand'?); columns there: Brand, price",
        "data.item_features.price: kind 'numeric' takes",
        "data.user_features names 'age', but there is no data.users table",
    ):
        assert part in text


def test_vectors_are_left_out_of_the_context(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "recray")
    found = choose(
        types={"context_v": pa.list_(pa.float32()), "context_w": pa.int64()}, columns={"context": ["v", "w"]}
    )
    assert list(found.context) == ["w"] and "left out of the context features: 'v' (list<" in caplog.text


def test_a_source_that_forgets_the_prefix() -> None:
    source = Source(None, 0, "", items=pa.table({"item": [1], "brand": ["a"]}))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the source's item table has a column 'brand': call it 'item_brand'"):
        kinds.choose(DataConfig(), source, KEYS)


def test_two_columns_of_one_name() -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array(["a"]), pa.array(["b"])], ["item_id", "brand", "brand"])
    with pytest.raises(DataError, match=r"items\.parquet has 2 columns called 'brand'"):
        choose(table)


@pytest.mark.parametrize(
    "column",
    [
        pa.array(DAYS, pa.date32()),
        pa.array([datetime(d.year, d.month, d.day) for d in DAYS], pa.timestamp("ns")),
        pa.array([datetime(d.year, d.month, d.day, tzinfo=UTC) for d in DAYS], pa.timestamp("s", "Europe/Paris")),
    ],
)
def test_dates_are_numbers_unless_they_are_declared_categorical(column: pa.Array) -> None:
    table = pa.table({"item_id": range(ROWS), "released": column})
    number, category = choose(table), choose(table, item_features={"released": {"kind": "categorical"}})
    assert number.items is not None and category.items is not None
    values = number.items["item_released"]
    feature = features.fit(
        "released", "item", number.item["released"], features.count_values(values, number.item["released"])
    )
    day = np.array([d.day for d in DAYS], float)
    assert features.encode(values, feature).to_numpy() == pytest.approx((day - day.mean()) / day.std(), abs=1e-5)
    values, kind = category.items["item_released"], category.item["released"]
    feature = features.fit("released", "item", kind, features.count_values(values, kind))
    assert [value[:10] for value in feature.vocabulary or []] == ["2020-01-01", "2020-01-02", "2020-01-03"]  # type: ignore[index]
    assert features.encode(values, feature).to_pylist() == [2 + (d.day - 1) for d in DAYS]
