"""Which files a location means. Expectations are those of Spark, DuckDB and pyarrow.dataset, written out or computed apart."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from recray import digests
from recray.data.sources import files
from recray.errors import DataError, StorageError


def _lay(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def _found(root: Path, location: str | list[str] | None = None) -> list[str]:
    return [os.path.relpath(info.uri, root) for info in files.find(location or str(root))]


def test_a_folder_is_listed_recursively_in_order_without_markers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _lay(tmp_path, "b.parquet", "a/2.parquet", "a/1.parquet", "_SUCCESS", ".x.parquet", "_tmp/c.parquet")
    caplog.set_level("INFO")
    for path in tmp_path.rglob("*.parquet"):
        pq.write_table(pa.table({"user": [1]}), path)
    expected = sorted(ds.dataset(tmp_path, format="parquet").files)
    assert [info.uri for info in files.find(str(tmp_path))] == expected
    assert files.find(str(tmp_path))[0].size == (tmp_path / "a/1.parquet").stat().st_size
    assert (
        "files that are not read: 3 hidden (names that begin with '_' or '.'): .x.parquet, _SUCCESS, c.parquet"
        in caplog.text
    )
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_partitions_that_begin_with_an_underscore_are_data(tmp_path: Path) -> None:
    """As in Spark, which hides _x but not _x=1."""
    _lay(tmp_path, "_day=1/p.parquet", "day=2/p.parquet", ".day=3/p.parquet", "_day/p.parquet")
    assert _found(tmp_path) == ["_day=1/p.parquet", "day=2/p.parquet"]


def test_endings_in_any_case_and_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _lay(tmp_path, "a.PARQUET", "b.parq", "c.Pq", "d.snappy.parquet", "part-0", "e.csv", "f.parquet.gz")
    assert _found(tmp_path) == ["a.PARQUET", "b.parq", "c.Pq", "d.snappy.parquet"]
    assert "3 that end neither in .parquet nor in .parq or .pq" in caplog.text and "part-0" in caplog.text
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize(
    "name", ["events.data", "clicks[2024].parquet", "what?.parquet", "a*b.parquet", "x{1,2}.parquet"]
)
def test_what_exists_comes_before_a_pattern(tmp_path: Path, name: str) -> None:
    _lay(tmp_path, name, "clicks2.parquet", "axb.parquet", "x1.parquet")
    assert _found(tmp_path, str(tmp_path / name)) == [name]
    _lay(tmp_path / "[in]", name)
    assert _found(tmp_path / "[in]", str(tmp_path / "[in]" / name)) == [name]


@pytest.mark.parametrize(
    "pattern",
    ["*.parquet", "day=*/*.parquet", "day=0?/*", "day=0[12]/a.parquet", "day=0[!1]/a.*", "**/a.parquet", "**/x/*.parquet",
     "day=*/x/**/*.parquet", "day=*/**/a.parquet"],
)  # fmt: skip
def test_globs_match_as_in_the_shell(tmp_path: Path, pattern: str) -> None:
    _lay(tmp_path, *(f"{day}{name}" for day in ("", "day=01/", "day=02/", "day=12/x/", "day=12/x/y/", "other/") for name in
                     ("a.parquet", "b.parquet")))  # fmt: skip
    expected = sorted(path for path in glob.glob(f"{tmp_path}/{pattern}", recursive=True) if os.path.isfile(path))
    assert [info.uri for info in files.find(f"{tmp_path}/{pattern}")] == expected


def test_globs_that_name_folders_and_alternatives(tmp_path: Path) -> None:
    _lay(
        tmp_path, "day=01/a.parquet", "day=01/_x/a.parquet", "day=02/x/a.parquet", "day=03/a.parquet", "day=03/note.txt"
    )
    assert _found(tmp_path, f"{tmp_path}/day=0*") == ["day=01/a.parquet", "day=02/x/a.parquet", "day=03/a.parquet"]
    assert _found(tmp_path, f"{tmp_path}/day={{01,03}}") == ["day=01/a.parquet", "day=03/a.parquet"]
    assert _found(tmp_path, f"{tmp_path}/**") == ["day=01/a.parquet", "day=02/x/a.parquet", "day=03/a.parquet"]
    assert _found(tmp_path, f"{tmp_path}/day=01/_*/*") == ["day=01/_x/a.parquet"]


def test_a_glob_names_files_of_any_ending(tmp_path: Path) -> None:
    _lay(tmp_path, "20240101_0001_abc", "20240101_0002_abc", "_SUCCESS", ".part.crc", "old_$folder$")
    assert _found(tmp_path, f"{tmp_path}/*") == ["20240101_0001_abc", "20240101_0002_abc"]
    with pytest.raises(StorageError, match=r"no '\*\.parquet' files in .*2 that end neither.*a glob that names them"):
        files.find(str(tmp_path))


def test_relative_home_and_file_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _lay(tmp_path, "in/a b.parquet", "in/b.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    both = ["in/a b.parquet", "in/b.parquet"]
    for location in ("in", "./in/", "in/*.parquet", "~/in", "~/in/*", f"file://{tmp_path}/in", f"file:{tmp_path}/in",
                     f"file://localhost{tmp_path}/in/*"):  # fmt: skip
        assert _found(tmp_path, location) == both
    assert _found(tmp_path, f"file://{tmp_path}/in/a%20b.parquet") == both[:1]
    assert all(os.path.isabs(info.uri) for info in files.find("in"))  # tasks run in other folders


def test_a_file_is_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _lay(tmp_path, "log/a.parquet", "log/b.parquet")
    os.symlink(tmp_path / "log" / "a.parquet", tmp_path / "log" / "c.parquet")
    os.symlink(tmp_path / "log", tmp_path / "same")
    locations = [f"{tmp_path}/log/b.parquet", f"{tmp_path}/log", f"{tmp_path}/same", f"{tmp_path}/log/b.parquet"]
    assert _found(tmp_path, locations) == ["log/b.parquet", "log/a.parquet"]
    assert "6 listed twice (read once): " in caplog.text


def test_links_are_followed_and_loops_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _lay(tmp_path, "log/day=1/a.parquet", "store/b.parquet", "beside.parquet")
    for target, link in (
        ("log", "log/loop"),
        (".", "log/up"),
        ("store", "log/day=2"),
        ("log/day=1", "store/x"),
        ("store", "log/day=1/y"),
    ):
        os.symlink(tmp_path / target, tmp_path / link)
    names = _found(tmp_path, f"{tmp_path}/log")
    assert names == ["log/day=1/a.parquet", "log/day=1/y/b.parquet"]
    assert "4 links that lead back to a folder above them: x, y, loop, ..." in caplog.text


def test_own_output_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _lay(tmp_path, "a.parquet", "runs/r/dataset/1a/train/p.parquet", "lists/part-0.parquet", "mine/b.parquet")
    identity = {"stage": "dataset", "identity": "1a", "keys": {}, "inputs": [], "created": ""}
    (tmp_path / "runs/r/dataset/1a/identity.json").write_text(json.dumps(identity))
    (tmp_path / "mine/identity.json").write_text('"of somebody else"')
    (tmp_path / "lists/_lists.json").write_text("{}")
    assert _found(tmp_path) == ["a.parquet", "mine/b.parquet"]
    assert "written by recray" in caplog.text
    with pytest.raises(StorageError, match=r"no '\*\.parquet' files in .*1 written by recray: p\.parquet"):
        files.find(str(tmp_path / "runs"))


@pytest.mark.parametrize(
    ("marker", "name", "export"),
    [
        ("_delta_log/0.json", "Delta Lake", "deltalake.DeltaTable"),
        ("metadata/v1.metadata.json", "Iceberg", "scan"),
        (".hoodie/hoodie.properties", "Hudi", "spark.read"),
    ],
)
def test_tables_with_versions_are_refused(tmp_path: Path, marker: str, name: str, export: str) -> None:
    _lay(tmp_path, f"lake/t/{marker}", "lake/t/data/day=1/a.parquet", "lake/t/b.parquet", "lake/other/c.parquet")
    for location in ("lake", "lake/t", "lake/t/*.parquet", "lake/*/*", "lake/t/data/*/*", "lake/t/data/day=1"):
        with pytest.raises(DataError, match=rf"lake/?.* is a table of {name}.*{export}"):
            files.find(f"{tmp_path}/{location}")
    assert _found(tmp_path, f"{tmp_path}/lake/other") == ["lake/other/c.parquet"]
    assert _found(tmp_path, f"{tmp_path}/lake/t/b.parquet") == ["lake/t/b.parquet"]  # asked for by name


def test_what_is_not_there(tmp_path: Path) -> None:
    _lay(tmp_path, "events.csv")
    for tail in ("absent", "absent/*.parquet"):
        with pytest.raises(StorageError, match=r"absent.* does not exist"):
            files.find(f"{tmp_path}/{tail}")
    with pytest.raises(StorageError, match=r"no '\*\.parquet' files in .*: check the path"):
        files.find(f"{tmp_path}/*.parquet")
    with pytest.raises(StorageError, match=r"1 that end neither .*: events\.csv"):
        files.find(str(tmp_path))
    with pytest.raises(StorageError, match=r"no '\*\.parquet' files in .*b"):
        files.find([f"{tmp_path}/events.csv", f"{tmp_path}/b*"])


# Fingerprints -------------------------------------------------------------------------------------------------------


def _digest(root: Path) -> str:
    return digests.fingerprint(files.find(str(root)))[0]


def test_a_fingerprint_follows_content_names_and_partitions_but_not_the_place(tmp_path: Path) -> None:
    for copy in ("one", "two"):
        _lay(tmp_path / copy, "a.parquet", "x/b.parquet")
        (tmp_path / copy / "a.parquet").write_bytes(b"a" * 200_000)
    first = _digest(tmp_path / "one")
    assert first == _digest(tmp_path / "two")
    changed = tmp_path / "two" / "a.parquet"
    before = os.stat(changed)
    with open(changed, "r+b") as stream:
        stream.seek(10)
        stream.write(b"b")
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))  # as touch -r does
    assert first != _digest(tmp_path / "two")
    (tmp_path / "one" / "a.parquet").rename(tmp_path / "one" / "c.parquet")
    assert first != _digest(tmp_path / "one")
    _lay(tmp_path / "day=1", "a.parquet")
    _lay(tmp_path / "day=2", "a.parquet")
    assert _digest(tmp_path / "day=1") != _digest(tmp_path / "day=2")


def test_large_inputs_are_known_by_their_change_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_HASHED_BYTES", 3)
    _lay(tmp_path, "a.parquet")
    path = tmp_path / "a.parquet"
    first, known_by = digests.fingerprint(files.find(str(path)))
    assert known_by == "inode and times" and first == digests.fingerprint(files.find(str(path)))[0]
    before = os.stat(path)
    path.write_bytes(b"A.parquet")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(path).st_mtime_ns == before.st_mtime_ns
    assert digests.fingerprint(files.find(str(path)))[0] != first
