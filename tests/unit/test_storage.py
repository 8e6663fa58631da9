import errno
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recray import storage
from recray.errors import DataError, StorageError

TABLE = pa.table({"user": pa.array([1, 2, 3], pa.int32()), "item": [[1], [2, 3], []]})


def _names(files: list[storage.FileInfo], root: Path) -> list[str]:
    return [os.path.relpath(info.uri, root) for info in files]


def _lay(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


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


def test_a_folder_is_listed_recursively_in_order_without_markers(tmp_path: Path) -> None:
    _lay(tmp_path, "b.parquet", "a/2.parquet", "a/1.parquet", "_SUCCESS", ".x.parquet", "_tmp/c.parquet", "note.txt")
    files = storage.list_files(str(tmp_path))
    assert _names(files, tmp_path) == ["a/1.parquet", "a/2.parquet", "b.parquet"]
    assert files[0].size == len("a/1.parquet")
    assert _names(storage.list_files(str(tmp_path), suffix=".txt"), tmp_path) == ["note.txt"]


def test_one_file_is_taken_whatever_its_name(tmp_path: Path) -> None:
    _lay(tmp_path, "events.data")
    assert storage.list_files(str(tmp_path / "events.data")) == [storage.FileInfo(str(tmp_path / "events.data"), 11)]


def test_globs(tmp_path: Path) -> None:
    _lay(tmp_path, "day=01/a.parquet", "day=02/a.parquet", "day=12/a.parquet", "other/a.parquet")
    assert _names(storage.list_files(f"{tmp_path}/day=0*/*.parquet"), tmp_path) == [
        "day=01/a.parquet",
        "day=02/a.parquet",
    ]
    assert len(storage.list_files(f"{tmp_path}/day=*")) == 3
    assert len(storage.list_files(f"{tmp_path}/day=?2")) == 2


def test_a_relative_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _lay(tmp_path, "a.parquet", "b.parquet")
    monkeypatch.chdir(tmp_path)
    assert len(storage.list_files("*.parquet")) == 2
    assert len(storage.list_files("a*.parquet")) == 1


def test_a_list_keeps_its_order(tmp_path: Path) -> None:
    _lay(tmp_path, "a.parquet", "b.parquet")
    locations = [str(tmp_path / "b.parquet"), str(tmp_path / "a.parquet")]
    assert [info.uri for info in storage.list_files(locations)] == locations


def test_an_empty_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    _lay(tmp_path, "events.csv")
    with pytest.raises(StorageError, match=r"no '\*\.parquet' files in .*1 other entries"):
        storage.list_files(str(tmp_path))


@pytest.mark.parametrize("tail", ["absent", "absent/*.parquet"])
def test_a_missing_location_is_named(tmp_path: Path, tail: str) -> None:
    with pytest.raises(StorageError, match=r"absent.* does not exist"):
        storage.list_files(f"{tmp_path}/{tail}")


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
    storage.delete_folder(stored)
    storage.delete_folder(stored)  # nothing happens the second time
    assert not storage.exists(stored)


def test_a_fingerprint_follows_content_and_names_but_not_the_place(tmp_path: Path) -> None:
    _lay(tmp_path / "one", "a.parquet", "x/b.parquet")
    _lay(tmp_path / "two", "a.parquet", "x/b.parquet")

    def digest(name: str) -> str:
        return storage.fingerprint(storage.list_files(str(tmp_path / name)))

    first = digest("one")
    assert first == digest("two")
    (tmp_path / "two" / "a.parquet").write_bytes(b"A.parquet")  # same size, other content
    assert first != digest("two")
    (tmp_path / "one" / "a.parquet").rename(tmp_path / "one" / "c.parquet")
    assert first != digest("one")


def test_a_record_of_another_version_says_so(tmp_path: Path) -> None:
    from recray.errors import LineageError
    from recray.records import IndexRecord

    (tmp_path / "index.json").write_text('{"recray_version": "0.0.1", "factory": "Flat", "shape": 3}')
    with pytest.raises(LineageError, match=r"index\.json was written by recray 0\.0\.1 .*run its stage again"):
        IndexRecord.read(str(tmp_path))
