import errno
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recray import folders, storage
from recray.errors import DataError, StorageError

TABLE = pa.table({"user": pa.array([1, 2, 3], pa.int32()), "item": [[1], [2, 3], []]})


@pytest.mark.parametrize(
    ("uri", "parts", "joined"),
    [
        ("runs", ("a", "dataset"), "runs/a/dataset"),
        ("runs/", ("/a/", "b.json"), "runs/a/b.json"),
        ("s3://bucket/x/", ("y",), "s3://bucket/x/y"),
    ],
)
def test_join(uri: str, parts: tuple[str, ...], joined: str) -> None:
    assert storage.join(uri, *parts) == joined


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(StorageError, match=r"hdfs://.*local path, s3:// or gs://"):
        storage.resolve("hdfs://node/events")


def test_file_uris_are_local_paths(tmp_path: Path) -> None:
    storage.write_bytes(f"file://{tmp_path}/a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


def test_bytes_and_json_round_trip_and_make_their_folder(tmp_path: Path) -> None:
    uri = str(tmp_path / "deep" / "record.json")
    assert not storage.exists(uri)
    storage.write_json(uri, {"id": "a", "n": [1, 2.5, None]})
    assert storage.exists(uri)
    assert storage.read_json(uri) == {"id": "a", "n": [1, 2.5, None]}
    assert storage.read_bytes(uri).endswith(b"}\n")


def test_reading_what_is_not_there_names_it(tmp_path: Path) -> None:
    uri = str(tmp_path / "absent.json")
    with pytest.raises(StorageError, match=r"absent\.json cannot be read"):
        storage.read_json(uri)


def test_a_write_that_fails_leaves_the_old_content_and_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "record.json")
    storage.write_bytes(uri, b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match=r"disk full: .*record\.json.*run\.output"):
        storage.write_bytes(uri, b"new")
    assert (tmp_path / "record.json").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["record.json"]


def test_a_full_disk_while_writing_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object, path: str, **__: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(StorageError, match="disk full"):
        storage.write_table(str(tmp_path / "a.parquet"), TABLE)
    assert os.listdir(tmp_path) == []


def test_tables_round_trip(tmp_path: Path) -> None:
    uri = str(tmp_path / "a.parquet")
    storage.write_table(uri, TABLE, row_group_rows=2)
    assert storage.read_table(uri).equals(TABLE)
    assert storage.read_table(uri, columns=["user"]).column_names == ["user"]
    assert storage.read_schema(uri) == (TABLE.schema, 3)
    assert pq.ParquetFile(uri).num_row_groups == 2


def test_a_broken_table_is_a_data_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"a\.parquet is not a whole Parquet file"):
        storage.read_table(str(tmp_path / "a.parquet"))


def test_folders_are_made_deleted_and_copied(tmp_path: Path) -> None:
    source, stored, back = (str(tmp_path / name) for name in ("source", "stored", "back"))
    storage.write_bytes(storage.join(source, "a.bin"), b"a")
    storage.write_bytes(storage.join(source, "b.bin"), b"b")
    storage.copy_folder(source, stored)
    storage.copy_folder(stored, back)
    assert {name: (tmp_path / "back" / name).read_bytes() for name in os.listdir(back)} == {
        "a.bin": b"a",
        "b.bin": b"b",
    }
    for _ in range(2):  # nothing happens the second time
        assert folders.delete_written(stored, re.compile(r"[ab]\.bin")) == []
    assert not storage.exists(stored)


def test_a_record_of_another_version_says_so(tmp_path: Path) -> None:
    from recray.errors import LineageError
    from recray.records import IndexRecord

    (tmp_path / "index.json").write_text('{"recray_version": "0.0.1", "factory": "Flat", "shape": 3}')
    with pytest.raises(LineageError, match=r"index\.json was written by recray 0\.0\.1 .*run its stage again"):
        IndexRecord.read(str(tmp_path))
