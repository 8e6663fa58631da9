"""The Parquet source without Ray: what it reads, and what it says of bad input."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from helpers.small_logs import START, config_of, events, write
from recray.config import DataConfig
from recray.data.sources import parquet
from recray.errors import ConfigError, DataError, StorageError


def _direct(config: DataConfig) -> pa.Table:
    """All events in file order, read in this process by what the tasks run."""
    log = parquet.Log.open(config)
    return pa.concat_tables(t for task in log.tasks() for t in parquet.read_task(task, log.plan)).combine_chunks()


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("declared", [True, False])
def test_integer_timestamps(tmp_path: Path, unit: str, declared: bool) -> None:
    scale = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}[unit]
    path = write(tmp_path / "a.parquet", events(timestamp=(START + np.arange(6)) * scale))
    table = _direct(config_of(path, timestamp_unit=unit if declared else "auto"))
    assert table["time"].to_pylist() == [(START + i) * 1_000_000 for i in range(6)]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([START * 1000 + i * 1000 for i in range(6)], pa.timestamp("ms")),
        pa.array([(START + i) * 10**9 for i in range(6)], pa.timestamp("ns", tz="Europe/Paris")),
        pa.array([START + i + 0.0 for i in range(6)], pa.float64()),
    ],
    ids=["ms", "zone", "float"],
)
def test_other_timestamps(tmp_path: Path, column: pa.Array) -> None:
    path = write(tmp_path / "a.parquet", events(timestamp=column))
    assert _direct(config_of(path))["time"].to_pylist() == [(START + i) * 1_000_000 for i in range(6)]


def test_positions(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", events(timestamp=np.arange(6)))
    config = config_of(path, timestamp_unit="order")
    assert _direct(config)["time"].to_pylist() == list(range(6))
    assert parquet.Log.open(config).plan.unit not in ("s", "ms", "us", "ns")


def test_without_timestamps_file_order_is_the_order(tmp_path: Path) -> None:
    for i in range(2):
        write(tmp_path / f"{i}.parquet", events(3, timestamp=None), row_group_size=2)
    config = config_of(str(tmp_path), {"timestamp": None})
    table = _direct(config)
    assert table["time"].to_pylist() == [0, 1, 2, 1 << 40, (1 << 40) + 1, (1 << 40) + 2]
    assert parquet.Log.open(config).plan.unit not in ("s", "ms", "us", "ns")


def test_large_files_are_cut_by_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", events(100), row_group_size=10)
    config = config_of(path)
    whole = _direct(config)
    monkeypatch.setattr(parquet, "_TASK_BYTES", 600)
    assert len(parquet.Log.open(config).tasks()) > 3
    assert _direct(config).equals(whole)


def test_types_that_spark_and_pandas_write(tmp_path: Path) -> None:
    element = pa.list_(pa.field("element", pa.int32()))
    tags = [[1, 2], [], None, [3], [4], [5]]
    first = events(
        user_id=pa.array(list("abcabc")).dictionary_encode(),
        item_id=pa.array(np.arange(6), pa.int32()),
        tags=pa.array(tags, element),
        words=pa.array([["x"]] * 6, pa.large_list(pa.large_string())),
        price=pa.array([1.5, math.nan, math.inf, None, 2.0, 3.0], pa.float32()),
        flag=pa.array([True] * 6),
    )
    second = events(
        user_id=pa.array(list("abcabc"), pa.large_string()),
        tags=pa.array(tags, pa.list_(pa.field("item", pa.int64()))),
        words=pa.array([["x"]] * 6, pa.list_(pa.string())),
        price=pa.array(np.arange(6)),
        flag=pa.array([None] * 6),
    )
    write(tmp_path / "1.parquet", first)
    write(tmp_path / "2.parquet", second)
    table = _direct(config_of(str(tmp_path), {"context": ["tags", "words", "price", "flag"]}))
    assert table.schema.field("user").type == pa.string()
    assert table.schema.field("item").type == pa.int64()
    assert table.schema.field("context_price").type == pa.float64()
    assert table.schema.field("context_flag").type == pa.int64()
    assert table["context_tags"].to_pylist() == tags * 2
    assert table["context_words"].to_pylist() == [["x"]] * 12


def test_hive_folders_are_columns_and_file_names_are_not(tmp_path: Path) -> None:
    for country in ("fr", "d%20e", "__HIVE_DEFAULT_PARTITION__"):
        write(tmp_path / f"country={country}" / "hour=003" / "minute=7.parquet", events(2))
    table = _direct(config_of(str(tmp_path), {"context": ["country", "hour"]}))
    assert sorted(map(str, table["context_country"].to_pylist())) == ["None", "None", "d e", "d e", "fr", "fr"]
    assert table["context_hour"].to_pylist() == ["003"] * 6  # not the number 3
    with pytest.raises(DataError, match="has no column 'minute'"):
        _direct(config_of(str(tmp_path), {"context": ["minute"]}))


def test_given_split_by_files_and_by_column(tmp_path: Path) -> None:
    paths = {f"{s}_path": write(tmp_path / f"{s}.parquet", events(2)) for s in ("train", "valid", "test")}
    table = _direct(config_of(None, split={"kind": "given", **paths}))
    assert table["split"].to_pylist() == ["train"] * 2 + ["valid"] * 2 + ["test"] * 2
    with pytest.raises(
        DataError, match=r"valid\.parquet is read by data\.split\.train_path and data\.split\.valid_path"
    ):
        _direct(config_of(None, split={"kind": "given", **paths, "train_path": str(tmp_path)}))
    path = write(tmp_path / "s.parquet", events(2, fold=["train", "test"]))
    table = _direct(config_of(path, {"split": "fold"}, split={"kind": "given"}))
    assert table["split"].to_pylist() == ["train", "test"]
    with pytest.raises(ConfigError, match=r"data\.split\.train_path and data\.split\.test_path"):
        _direct(config_of(path, split={"kind": "given"}))


def test_side_tables(tmp_path: Path) -> None:
    path = write(tmp_path / "e.parquet", events())
    items = pa.table({"price": [1.0, 2.0], "item_id": pa.array([0, 10], pa.int32()), "tags": [["a"], ["b"]]})
    config = config_of(path, items=write(tmp_path / "i.parquet", items))
    log = parquet.Log.open(config)
    found = log.side_table("item")
    assert found is not None and log.side_table("user") is None
    assert found.column_names == ["item", "item_price", "item_tags"]
    assert found["item"].type == pa.int64()
    twice = write(tmp_path / "t.parquet", pa.concat_tables([items, items.slice(0, 1)]))
    with pytest.raises(DataError, match=r"'item_id' repeats 1 of 2 keys, '0' 2 times; keep one row per item"):
        parquet.Log.open(config_of(path, items=twice)).side_table("item")
    with pytest.raises(DataError, match=r"no column 'user_id' to join on.*; columns there: price, item_id, tags"):
        parquet.Log.open(config_of(path, users=config.items)).side_table("user")


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    table = events()
    twice = pa.Table.from_arrays([*table.columns, table["item_id"]], [*table.column_names, "item_id"])
    with pytest.raises(DataError, match=r"twice\.parquet has 2 columns called 'item_id'"):
        _direct(config_of(write(tmp_path / "twice.parquet", twice)))
    other = pa.Table.from_arrays([*table.columns, table["item_id"], table["item_id"]], [*table.column_names, "x", "x"])
    assert len(_direct(config_of(write(tmp_path / "other.parquet", other)))) == len(table)


NULLS = pa.array([1, None, 2, 3, 4, 5])
BAD: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    (
        "missing",
        {},
        {"user": "userid"},
        {},
        r"no column 'userid' \(did you mean 'user_id'\?\); columns there: user_id, item_id",
    ),
    ("another case", {}, {"item": "ITEM_ID"}, {}, r"no column 'ITEM_ID' \(did you mean 'item_id'\?\)"),
    (
        "float ids",
        {"item_id": np.arange(6) / 2},
        {},
        {},
        r"'item_id' holds values that are not int64: Float value 0.5",
    ),
    (
        "text time",
        {"timestamp": ["today"] * 6},
        {},
        {},
        r"'timestamp' holds text such as 'today', and not only ISO 8601 times",
    ),
    ("text label", {"label": ["yes"] * 6}, {"label": "label"}, {}, r"'label' is string, but role label takes numbers"),
    ("struct", {"c": [{"a": 1}] * 6}, {"context": ["c"]}, {}, r"'c' is struct<a: int64>, but role context takes"),
    ("null user", {"user_id": NULLS}, {}, {}, r"a\.parquet: column 'user_id' has 1 null ids in 6 rows; drop or fill"),
    ("null item", {"item_id": pa.nulls(6)}, {}, {}, r"column 'item_id' has 6 null ids in 6 rows"),
    (
        "null time",
        {"timestamp": NULLS},
        {},
        {"timestamp_unit": "order"},
        r"'timestamp' has 1 null timestamps in 6 rows",
    ),
    (
        "NaN label",
        {"y": [0, 1, math.nan, 0, 1, 1]},
        {"label": "y"},
        {},
        r"'y' has 1 values in 6 rows that are null, NaN",
    ),
    ("label 3", {"y": [0, 1, 3, 0, 1, 1]}, {"label": "y"}, {}, r"'y' holds values from 0 to 3: a label is 0 or 1"),
    (
        "NaN weight",
        {"w": [math.inf] + [1.0] * 5},
        {"weight": "w"},
        {},
        r"'w' has 1 values in 6 rows that are null, NaN",
    ),
    ("weight < 0", {"w": [-1.0] + [1.0] * 5}, {"weight": "w"}, {}, r"'w' holds -1: a weight must be >= 0"),
    (
        "positions",
        {"timestamp": np.arange(6)},
        {},
        {},
        r"timestamp in the wrong unit: .* holds 2, which is in no unit.*'order'",
    ),
    (
        "wrong unit",
        {},
        {},
        {"timestamp_unit": "ms"},
        r"wrong unit: .*'timestamp' holds 1600000000, which is not in the unit 'ms'",
    ),
    (
        "one bad time",
        {"timestamp": [START] * 5 + [0]},
        {},
        {},
        r"holds 0, which is 1970-01-01 00:00:00, in 1 of 6 rows: outside of 1990 to 2100, and often written for 'no time'",
    ),
    ("NaN time", {"timestamp": [START + 0.5] * 5 + [math.nan]}, {}, {}, r"'timestamp' has NaN or infinite timestamps"),
    (
        "split name",
        {"s": ["train"] * 5 + ["dev"]},
        {"split": "s"},
        {},
        r"'s' holds 'dev': a split is named train, valid, test",
    ),
    ("no rows", {k: pa.array([], pa.int64()) for k in ("user_id", "item_id", "timestamp")}, {}, {}, "hold no rows"),
]


@pytest.mark.parametrize(("changes", "columns", "data", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(tmp_path: Path, changes: Any, columns: Any, data: Any, message: str) -> None:
    path = write(tmp_path / "a.parquet", events(**changes))
    with pytest.raises(DataError, match=message):
        _direct(config_of(path, columns, **data))


def test_files_that_disagree(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", events())
    write(tmp_path / "b.parquet", events(user_id=list("abcdef")))
    with pytest.raises(DataError, match=r"b\.parquet: column 'user_id' is string, but int64 in .*a\.parquet"):
        _direct(config_of(str(tmp_path)))


@pytest.mark.parametrize("damage", ["tail", "head", "empty", "page"])
def test_broken_files_are_named(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "a.parquet", events())
    path = tmp_path / "b.parquet"
    write(path, events(20_000, timestamp=START + np.arange(20_000)), compression="zstd")
    data = path.read_bytes()
    middle = len(data) // 2
    broken = {
        "tail": data[: len(data) // 2],
        "head": b"PAR1" + data[middle:],
        "empty": b"",
        "page": data[:4] + b"\xff" * 60 + data[64:],
    }
    path.write_bytes(broken[damage])
    with pytest.raises(DataError, match=r"b\.parquet is not a whole Parquet file"):
        _direct(config_of(str(tmp_path)))


def test_nothing_there(tmp_path: Path) -> None:
    for path in (str(tmp_path), str(tmp_path / "none"), str(tmp_path / "*.parquet")):
        with pytest.raises(StorageError, match=str(tmp_path)):
            parquet.Log.open(config_of(path))
    with pytest.raises(ConfigError, match=r"data\.path is not set"):
        parquet.Log.open(config_of(None))
