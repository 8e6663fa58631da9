"""`recray compact`: the same rows in fewer files, against pyarrow.dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from helpers.cli import recray_command
from recray.data.compact import compact
from recray.errors import DataError, StorageError


def _log(folder: Path) -> pa.Table:
    """40 files in folders day=...; half of them have a narrower type and lack a column."""
    rng = np.random.default_rng(0)
    for number in range(40):
        target = folder / f"day=2024-01-{number % 4 + 1:02d}"
        target.mkdir(parents=True, exist_ok=True)
        kind = np.int32 if number % 2 else np.int64
        rows = {"user": rng.integers(0, 9, 25).astype(kind), "time": rng.integers(0, 10**6, 25)}
        if number % 2:
            rows["device"] = np.array(["phone", "tv"] * 12 + ["tv"])
        pq.write_table(pa.table(rows), target / f"{number:02d}.parquet")
    names = ["user", "time", "device", "day"]
    schema = pa.schema(zip(names, [pa.int64(), pa.int64(), pa.string(), pa.string()], strict=True))
    return ds.dataset(folder, schema=schema, partitioning=ds.partitioning(flavor="hive")).to_table(columns=names)


def _rows(table: pa.Table) -> list[tuple[object, ...]]:
    columns = ["user", "time", "device", "day"]
    return sorted(zip(*(table[name].to_pylist() for name in columns), strict=True), key=str)


def test_rows_are_the_same_and_each_file_is_sorted(tmp_path: Path) -> None:
    expected = _log(tmp_path / "in")
    found = compact(str(tmp_path / "in"), str(tmp_path / "out"), "time", file_bytes=8000)
    parts = [pq.read_table(part) for part in sorted((tmp_path / "out").iterdir())]
    assert (found.rows, found.files_before, found.files) == (1000, 40, len(parts))
    assert 1 < len(parts) < 40
    assert _rows(pa.concat_tables(parts)) == _rows(expected)
    for part in parts:
        assert part["time"].to_pylist() == sorted(part["time"].to_pylist())
    compact(str(tmp_path / "in"), str(tmp_path / "again"))
    in_order = pa.concat_tables(pq.read_table(part) for part in sorted((tmp_path / "again").iterdir()))
    assert in_order["time"].to_pylist() == expected["time"].to_pylist()


def test_what_is_refused(tmp_path: Path) -> None:
    _log(tmp_path / "in")
    with pytest.raises(DataError, match=r"no column 'tim' \(did you mean 'time'\?\)"):
        compact(str(tmp_path / "in"), str(tmp_path / "out"), "tim")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(StorageError, match=r"mine\.txt"):
        compact(str(tmp_path / "in"), str(tmp_path / "full"))
    pq.write_table(pa.table({"user": ["text"], "time": [1]}), tmp_path / "in" / "odd.parquet")
    with pytest.raises(DataError, match="cannot be joined"):
        compact(str(tmp_path / "in"), str(tmp_path / "out"))


def test_the_command_says_what_was_gained(tmp_path: Path) -> None:
    _log(tmp_path / "in")
    done = recray_command("compact", str(tmp_path / "in"), str(tmp_path / "out"))
    assert done.code == 0 and "40 files to 1" in done.out and "1,000 rows" in done.out and "rows/s" in done.out
