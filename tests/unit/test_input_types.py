"""Files whose columns differ are read as one table. Expected values are written out or computed with pandas."""

from __future__ import annotations

import base64
import datetime
import logging
import math
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest

from recray import storage
from recray.config import DataConfig
from recray.data.sources import parquet
from recray.errors import DataError

START = 1_600_000_000


def _log(root: Path, *parts: dict[str, Any], **config: Any) -> parquet.Log:
    """Files 0.parquet, 1.parquet, ... of 4 events each with these columns; a column that is None is left out."""
    root.mkdir(exist_ok=True)
    for number, part in enumerate(parts):
        columns = {"user_id": [1, 2, 3, 4], "item_id": [5, 6, 7, 8], "timestamp": np.arange(4) + START} | part
        table = pa.table({name: value for name, value in columns.items() if value is not None})
        pq.write_table(table, root / f"{number}.parquet")
    columns = {"timestamp": "timestamp", **config.pop("columns", {})}
    return parquet.Log.open(DataConfig.model_validate({"path": str(root), "columns": columns, **config}))


def _events(log: parquet.Log) -> pa.Table:
    return pa.concat_tables(t for task in log.tasks() for t in parquet.read_task(task, log.plan))


UUIDS = [str(uuid.UUID(int=i * 7919 + 1)) for i in range(4)]
RAW = [uuid.UUID(text).bytes for text in UUIDS]
BIG = [2**64 - 1, 5, 2**63, 7]
IDS: list[tuple[str, list[pa.Array], list[Any]]] = [
    ("small integers", [pa.array([1, 2, 3, 4], t) for t in (pa.int8(), pa.uint16(), pa.int64(), pa.uint64())], [1, 2, 3, 4]),
    ("decimals", [pa.array(map(Decimal, range(4)), t) for t in (pa.decimal128(38, 0), pa.decimal32(9, 0), pa.decimal256(60, 0))], [0, 1, 2, 3]),
    ("decimals with a point", [pa.array([Decimal("1.00"), Decimal("2.00"), Decimal(3), Decimal(4)], pa.decimal128(38, 9)), pa.array([1, 2, 3, 4])], [1, 2, 3, 4]),
    ("integers as pandas writes them where a row was null", [pa.array([1.0, 2.0, 3.0, 4.0]), pa.array([1, 2, 3, 4], pa.int32())], [1, 2, 3, 4]),
    ("hashes of 64 bits", [pa.array(BIG, pa.uint64()), pa.array(BIG, pa.decimal128(38, 0))], [str(x) for x in BIG]),
    ("hashes, of which the other file has small ones only", [pa.array(BIG, pa.uint64()), pa.array([1, 2, 3, 4], pa.uint64())], [str(x) for x in BIG]),
    ("UUIDs", [pa.ExtensionArray.from_storage(pa.uuid(), pa.array(RAW, pa.binary(16))), pa.array(RAW, pa.binary(16)), pa.array(UUIDS)], UUIDS),
    ("bytes of a fixed width", [pa.array([b"\xff\x00", b"ab", b"cd", b"\x00\x01"], pa.binary(2))], ["ff00", "6162", "6364", "0001"]),
    ("text", [pa.array(list("abcd"), t) for t in (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())] + [pa.array(list("abcd")).dictionary_encode()], list("abcd")),
    ("negative", [pa.array([-(2**63), -1, 0, 2**63 - 1])], [-(2**63), -1, 0, 2**63 - 1]),
]  # fmt: skip


@pytest.mark.parametrize(("parts", "expected"), [case[1:] for case in IDS], ids=[case[0] for case in IDS])
def test_ids(tmp_path: Path, parts: list[pa.Array], expected: list[Any]) -> None:
    events = _events(_log(tmp_path / "log", *({"user_id": part} for part in parts)))
    kind = pa.string() if isinstance(expected[0], str) else pa.int64()
    assert events["user"].type == kind
    for number in range(len(parts)):
        small = kind == pa.string() and parts[number].to_pylist() == [1, 2, 3, 4]
        assert events["user"].slice(4 * number, 4).to_pylist() == (["1", "2", "3", "4"] if small else expected)
    # An item table with keys of any of these types joins.
    side = tmp_path / "items.parquet"
    pq.write_table(pa.table({"item_id": parts[-1], "x": [1, 2, 3, 4]}), side)
    log = _log(tmp_path / "log2", {"item_id": parts[0]}, items=str(side))
    table = log.side_table("item")
    assert table is not None and table["item"].type == kind == _events(log)["item"].type


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([1.5, 2, 3, 4]), r"'user_id' holds values that are not int64: Float value 1\.5\d* was truncated"),
        (pa.array([2.0**60, 2, 3, 4]), r"'user_id' is double, which rounds integers above 2\^53"),
        (pa.array([b"\xff", b"a", b"b", b"c"]), r"'user_id' holds bytes that are not UTF-8 text"),
        (pa.array([{"id": 1}] * 4), r"'user_id' is struct<id: int64>, but role user takes integers or strings"),
        (pa.array([[1]] * 4), r"'user_id' is list<element: int64>, but role user takes"),
    ],
)
def test_what_no_id_can_be(tmp_path: Path, column: pa.Array, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _events(_log(tmp_path / "log", {"user_id": column}))


def test_context_columns_of_files_that_differ_are_what_pandas_makes_of_them(tmp_path: Path) -> None:
    day = datetime.date(2024, 1, 2)
    parts: list[dict[str, Any]] = [
        {"a": pa.array([1, 2, None, 4], pa.int8()), "b": ["x", None, "y", "x"], "c": pa.nulls(4), "d": [[1], [], None, [2]],
         "e": [True, False, None, True], "f": [day] * 4, "new": None},
        {"a": [0.5, math.nan, 1.0, 2.0], "b": pa.array(["x", "z", None, "z"]).dictionary_encode(), "c": pa.array([1, 2, 3, 4]),
         "d": pa.array([[1], [2, None], [], [3]], pa.large_list(pa.int16())), "e": [0, 1, 2, 3],
         "f": pa.array([1704153600] * 4, pa.timestamp("s")), "new": list("pqrs")},
        {"a": pa.array([None] * 4, pa.string()), "b": pa.array([None] * 4, pa.float64()), "c": None, "d": None,
         "e": pa.nulls(4, pa.string()), "f": pa.nulls(4), "new": pa.array(list("pqrs"), pa.string_view())},
    ]  # fmt: skip
    names = ["a", "b", "c", "d", "e", "f", "new"]
    events = _events(_log(tmp_path / "log", *parts, columns={"context": names}))
    frames = [
        pd.DataFrame({n: [None] * 4 if p.get(n) is None else pa.array(p[n]).to_pylist() for n in names}, dtype=object)
        for p in parts
    ]
    expected = pd.concat(frames, ignore_index=True)
    expected["f"] = pd.to_datetime(expected["f"]).astype(object).where(expected["f"].notna(), None)
    element = pa.list_(pa.field("element", pa.int64()))
    kinds = [pa.float64(), pa.string(), pa.int64(), element, pa.int64(), pa.timestamp("us"), pa.string()]
    assert [events[f"context_{name}"].type for name in names] == kinds
    for name in names:
        for got, want in zip(events[f"context_{name}"].to_pylist(), expected[name], strict=True):
            assert (got is None and want is None) or got == want or (got != got and want != want)


def test_a_column_that_some_files_lack_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = _log(tmp_path / "log", {"device": None}, {"device": list("abcd")}, columns={"context": ["device"]})
    assert _events(log)["context_device"].to_pylist() == [None] * 4 + list("abcd")
    assert "column 'device' is missing in 1 of 2 files" in caplog.text and "null in 4 of 8 rows" in caplog.text
    with pytest.raises(DataError, match=r"0\.parquet has no column 'Devise' \(did you mean 'device'\?\)"):
        _log(tmp_path / "log", {"device": list("abcd")}, columns={"context": ["Devise"]})


@pytest.mark.parametrize("kind", [pa.float64(), pa.string(), pa.null(), None])
def test_a_file_without_rows_has_no_say(tmp_path: Path, kind: pa.DataType | None) -> None:
    log = _log(tmp_path / "log", {"tag": list("abcd")}, {"tag": list("efgh")})
    names = ("user_id", "item_id", "timestamp", "tag") if kind is not None else ()
    pq.write_table(pa.table({name: pa.array([], kind) for name in names}), tmp_path / "log" / "00.parquet")
    config = log.config.model_copy(update={"columns": log.config.columns.model_copy(update={"context": ["tag"]})})
    events = _events(parquet.Log.open(config))
    assert events["context_tag"].to_pylist() == list("abcdefgh") and events["user"].type == pa.int64()


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        _log(
            tmp_path / "log",
            {"user_id": None, "USER_ID": [1] * 4, "tag": [1, 2, 3, 4], "label": ["no"] * 4},
            {"user_id": None, "USER_ID": [1] * 4, "tag": ["a"] * 4, "label": ["no"] * 4},
            columns={"context": ["tag"], "label": "label"},
        )
    text = str(caught.value)
    assert "no column 'user_id' (did you mean 'USER_ID'?)" in text
    assert "1.parquet: column 'tag' is string, but int64 in" in text and "0.parquet" in text
    assert "'label' is string, but role label takes numbers 0 and 1" in text


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.table([[1], [1], [2], [START]], names=["user_id", "user_id", "item_id", "timestamp"])
    pq.write_table(table, tmp_path / "a.parquet")
    config = DataConfig.model_validate({"path": str(tmp_path), "columns": {"timestamp": "timestamp"}})
    with pytest.raises(DataError, match=r"a\.parquet has 2 columns called 'user_id'"):
        parquet.Log.open(config)


@pytest.mark.parametrize("column", ["label", "weight"])
@pytest.mark.parametrize("nothing", [pa.nulls(4), pa.nulls(4, pa.float64()), pa.nulls(4, pa.string())])
def test_labels_and_weights_that_are_null_in_one_file(tmp_path: Path, column: str, nothing: pa.Array) -> None:
    log = _log(tmp_path / "log", {column: [0, 1, 1, 0]}, {column: nothing}, columns={column: column})
    with pytest.raises(DataError, match=rf"1\.parquet: column '{column}' has 4 values in 4 rows that are null"):
        _events(log)


# Partitions -----------------------------------------------------------------------------------------------------------


def _partitioned(root: Path, key: str, values: list[str], **config: Any) -> parquet.Log:
    for value in values:
        folder = root / "log" / f"{key}={value}"
        folder.mkdir(parents=True)
        pq.write_table(
            pa.table({"user_id": [1, 2], "item_id": [3, 4], "timestamp": [START, START + 1]}), folder / "p.parquet"
        )
    columns = {"timestamp": "timestamp", **config.pop("columns", {"context": [key]})}
    return parquet.Log.open(DataConfig.model_validate({"path": str(root / "log"), "columns": columns, **config}))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["10", "-2", "0"], {10, -2, 0}),
        (["7", "007", "0007"], {"7", "007", "0007"}),
        (["01001", "2A001"], {"01001", "2A001"}),
        (["1.5", "2"], {"1.5", "2"}),
        (["d%20e", "a%2Fb", "a=b", "%E7%94%A8"], {"d e", "a/b", "a=b", "用"}),
        (["__HIVE_DEFAULT_PARTITION__", "5"], {None, 5}),
        (["__HIVE_DEFAULT_PARTITION__", "x"], {None, "x"}),
        (["9223372036854775807", "9223372036854775808"], {"9223372036854775807", "9223372036854775808"}),
        (["-0", "+1"], {"-0", "+1"}),
    ],
)
def test_partition_values(tmp_path: Path, values: list[str], expected: set[Any]) -> None:
    assert set(_events(_partitioned(tmp_path, "store", values))["context_store"].to_pylist()) == expected


def test_a_partition_plays_any_role(tmp_path: Path) -> None:
    events = _events(_partitioned(tmp_path / "1", "label", ["0", "1"], columns={"label": "label"}))
    assert events["label"].to_pylist() == [0, 0, 1, 1]
    events = _events(_partitioned(tmp_path / "2", "who", ["7", "8"], columns={"user": "who"}))
    assert events["user"].to_pylist() == [7, 7, 8, 8]
    events = _events(_partitioned(tmp_path / "3", "date", ["2024-01-31", "2024-02-01"], columns={"timestamp": "date"}))
    days = pd.to_datetime(["2024-01-31", "2024-02-01"]).as_unit("us").asi8.repeat(2)
    assert events["time"].to_pylist() == days.tolist()
    seconds = [str(START), str(START + 86_400)]
    events = _events(_partitioned(tmp_path / "4", "epoch", seconds, columns={"timestamp": "epoch"}))
    assert events["time"].to_pylist() == [int(s) * 1_000_000 for s in seconds for _ in range(2)]


def test_a_column_of_the_file_comes_before_the_folder(tmp_path: Path) -> None:
    for value in (100, 200):
        (tmp_path / "log" / f"store={value + 1}").mkdir(parents=True)
        table = pa.table({"user_id": [1], "item_id": [1], "timestamp": [START], "store": [value]})
        pq.write_table(table, tmp_path / "log" / f"store={value + 1}" / "p.parquet")
    config = {"path": str(tmp_path / "log"), "columns": {"timestamp": "timestamp", "context": ["store"]}}
    assert _events(parquet.Log.open(DataConfig.model_validate(config)))["context_store"].to_pylist() == [100, 200]


# Side tables ----------------------------------------------------------------------------------------------------------


def _side(root: Path, parts: dict[str, dict[str, Any]], **config: Any) -> pa.Table:
    for name, part in parts.items():
        path = root / "items" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(part), path)
    table = _log(root / "log", {}, items=str(root / "items"), **config).side_table("item")
    assert table is not None
    return table.sort_by("item")


def test_side_tables_of_files_that_differ(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = _side(
        tmp_path,
        {
            "lang=en/a.parquet": {
                "item_id": pa.array([5, 6], pa.int32()),
                "brand": pa.array(["a", "b"]).dictionary_encode(),
                "size": [1, 2],
                "price": [1, 2],
            },
            "lang=fr/b.parquet": {
                "item_id": pa.array([7, 8]),
                "brand": ["b", None],
                "size": [0.5, 1],
                "color": ["r", "g"],
            },
            "lang=fr/empty.parquet": {"item_id": pa.array([], pa.string()), "brand": pa.array([], pa.float64())},
        },
    )
    assert table.to_pydict() == {
        "item": [5, 6, 7, 8],
        "item_brand": ["a", "b", "b", None],
        "item_size": [1.0, 2.0, 0.5, 1.0],
        "item_price": [1, 2, None, None],
        "item_lang": ["en", "en", "fr", "fr"],
        "item_color": [None, None, "r", "g"],
    }
    assert "column 'price' is missing in 1 of 2 files" in caplog.text


def test_columns_that_are_not_declared_are_neither_read_nor_converted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd = {"picture": [b"\xff\xfe", b"\x89PNG"], "hash": pa.array([2**64 - 1, 1], pa.uint64()), "n": [{"a": 1}] * 2}
    parts: dict[str, dict[str, Any]] = {
        "a.parquet": {"item_id": [5, 6], "brand": ["x", "y"], "mixed": [1, 2], **odd},
        "b.parquet": {"item_id": [7, 8], "brand": ["x", "y"], "mixed": ["1", "2"], **odd},
    }
    declared = {"item_features": {"brand": {"kind": "categorical"}}}
    assert _side(tmp_path / "1", parts, **declared).column_names == ["item", "item_brand"]
    with caplog.at_level(logging.INFO):
        assert _side(tmp_path / "2", parts).column_names == ["item", "item_brand", "item_hash"]
    for reason in ("'picture' holds bytes", "'n' is struct", "'mixed' is string, but int64 in"):
        assert reason in caplog.text
    with pytest.raises(DataError, match=r"b\.parquet: column 'mixed' is string, but int64 in .*a\.parquet"):
        _side(tmp_path / "3", parts, item_features={"mixed": {"kind": "categorical"}})
    with pytest.raises(
        DataError, match=r"items has no column 'brnd' \(did you mean 'brand'\?\); columns there: item_id"
    ):
        _side(tmp_path / "4", parts, item_features={"brnd": {"kind": "categorical"}})


# Times ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        ["2024-01-31", "2024-01-31 10:00:00", "2024-02-01T00:00:00.5", "2024-02-01 10:00"],
        ["2024-01-31T10:00:00Z", "2024-01-31T10:00:00+02:00", "2024-02-01T10:00:00Z", "2024-03-01T10:00:00-0500"],
        ["2024-01-31T10:00:00.123456789", "2024-01-31T10:00:00", "2024-02-01", "2024-03-01"],
    ],
)
def test_times_as_iso_text(tmp_path: Path, text: list[str]) -> None:
    expected = pd.to_datetime(text, format="ISO8601", utc=True).floor("us").as_unit("us").asi8.tolist()
    assert _events(_log(tmp_path / "log", {"timestamp": text}))["time"].to_pylist() == expected


GOOD = datetime.datetime(2024, 1, 1)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            pa.array([GOOD] * 3 + [datetime.datetime(9999, 12, 31)], pa.timestamp("us")),
            r"9999-12-31 00:00:00 in 1 of 4 rows",
        ),
        (
            pa.array([GOOD] * 3 + [datetime.datetime(1970, 1, 1)], pa.timestamp("ms")),
            r"1970-01-01 00:00:00 in 1 of 4 rows",
        ),
        (pa.array([datetime.datetime(1, 1, 1)] * 4, pa.timestamp("us")), r"0001-01-01 00:00:00 in 4 of 4 rows"),
        (pa.array([datetime.date(1900, 1, 1)] * 2 + [datetime.date(2024, 1, 1)] * 2), r"1900-01-01 00:00:00 in 2 of 4"),
        (pa.array([2**62] + [START * 1000] * 3, pa.timestamp("ms")), r"holds times that are no dates"),
        (pa.array([START] * 3 + [-1]), r"holds -1, which is 1969-12-31 23:59:59, in 1 of 4 rows"),
        (pa.array([START] * 3 + [-(2**63)]), r"holds -9223372036854775808, which is the year -\d+, in 1 of 4 rows"),
        (pa.array([START] * 3 + [253402300799]), r"holds 253402300799, which is 9999-12-31 23:59:59, in 1 of 4"),
        (pa.array([True] * 4), r"wrong unit"),
        (pa.nulls(4), r"'timestamp' has 4 null timestamps in 4 rows"),
    ],
)
def test_times_that_stand_for_no_time_are_named(tmp_path: Path, column: pa.Array, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _events(_log(tmp_path / "log", {"timestamp": column}))


# Damaged and encrypted files --------------------------------------------------------------------------------------------


def test_checksums_of_pages_are_written_and_verified(tmp_path: Path) -> None:
    uri = str(tmp_path / "a.parquet")
    rng = np.random.default_rng(0)
    table = pa.table({"user_id": rng.integers(0, 2**62, 5000), "item_id": rng.integers(0, 9, 5000)})
    storage.write_table(uri, table)
    assert storage.read_table(uri).equals(table)
    data = bytearray(Path(uri).read_bytes())
    pq.write_table(
        table, tmp_path / "plain.parquet", compression="none", use_dictionary=False, write_page_checksum=True
    )
    data = bytearray((tmp_path / "plain.parquet").read_bytes())
    data[20_000] ^= 1
    (tmp_path / "plain.parquet").write_bytes(data)
    assert pq.ParquetFile(tmp_path / "plain.parquet").read().num_rows == 5000  # unnoticed without them
    with pytest.raises(DataError, match=r"plain\.parquet .*checksum of a page does not match"):
        storage.read_table(str(tmp_path / "plain.parquet"))
    # The bytes that storage writes hold a checksum for every page: one that is flipped is found.
    data = bytearray(Path(uri).read_bytes())
    data[3_000] ^= 1
    Path(uri).write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet .*checksum of a page does not match"):
        storage.read_table(uri)


class _Keys(pe.KmsClient):
    def __init__(self, config: Any) -> None:
        super().__init__()

    def wrap_key(self, key: bytes, name: str) -> bytes:
        return base64.b64encode(key)

    def unwrap_key(self, key: str, name: str) -> bytes:
        return base64.b64decode(key)


@pytest.mark.parametrize("plain_footer", [False, True])
def test_encrypted_files_are_named(tmp_path: Path, plain_footer: bool) -> None:
    big = pa.array([2**64 - 1, 1], pa.uint64())
    table = pa.table({"user_id": big, "item_id": big, "timestamp": [START, START + 1]})
    how = pe.EncryptionConfiguration("k", column_keys={"c": ["user_id"]}, plaintext_footer=plain_footer)
    props = pe.CryptoFactory(_Keys).file_encryption_properties(pe.KmsConnectionConfig(), how)
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema, encryption_properties=props) as writer:
        writer.write_table(table)
    config = {"path": str(tmp_path / "a.parquet"), "columns": {"timestamp": "timestamp"}}
    with pytest.raises(DataError, match=r"a\.parquet is encrypted .*write a copy without encryption"):
        _events(parquet.Log.open(DataConfig.model_validate(config)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty: 0 bytes"),
        (b"PAR1 and no more", "truncated or corrupt"),
        (b"user_id,item_id\n1,2\n", "another format: .*PAR1"),
    ],
)
def test_files_that_are_not_whole(tmp_path: Path, data: bytes, reason: str) -> None:
    _log(tmp_path / "log", {})
    (tmp_path / "log" / "z.parquet").write_bytes(data)
    config = {"path": str(tmp_path / "log"), "columns": {"timestamp": "timestamp"}}
    with pytest.raises(DataError, match=rf"z\.parquet is not a whole Parquet file \({reason}\)"):
        parquet.Log.open(DataConfig.model_validate(config))
