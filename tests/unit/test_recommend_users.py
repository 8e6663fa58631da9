"""The keys of `recray recommend --users`, from files that differ."""

from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recray.data.dataset import PreparedDataset
from recray.errors import DataError
from recray.evaluation import recommend


class _Dataset:
    def __init__(self, keys: list[Any]) -> None:
        self.keys = keys

    def user_keys(self) -> pa.Table:
        return pa.table({"user": self.keys})


def _keys(folder: Path, *parts: pa.Table, known: list[Any] | None = None) -> list[Any]:
    folder.mkdir(exist_ok=True)
    for number, part in enumerate(parts):
        pq.write_table(part, folder / f"{number}.parquet")
    dataset = cast("PreparedDataset", _Dataset(known or [1]))
    return cast("list[Any]", recommend._keys(str(folder), "user_id", dataset).to_pylist())


def test_files_that_differ(tmp_path: Path) -> None:
    numbers = [
        pa.table({"user_id": pa.array([n, n + 1], t)}) for n, t in enumerate((pa.int64(), pa.int32(), pa.float64()))
    ]
    numbers[1] = numbers[1].append_column("note", pa.array(["a", "b"]))
    assert _keys(tmp_path / "1", *numbers, pa.table({"user_id": pa.array([], pa.string())})) == [0, 1, 2, 3]
    texts = [pa.table({"user_id": pa.array(["a", "b"], t)}) for t in (pa.string(), pa.large_string(), pa.binary())]
    assert _keys(tmp_path / "2", *texts, pa.table({"x": pa.array([], pa.null())}), known=["a"]) == ["a", "b"]
    # Hashes of 64 bits are text in the dataset, and here even if these fit.
    assert _keys(tmp_path / "3", pa.table({"user_id": pa.array([5], pa.uint64())}), known=[str(2**64 - 1)]) == ["5"]


def test_no_users_and_wrong_ones_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 holds no users: no file there has rows"):
        _keys(tmp_path / "1", pa.table({"user_id": pa.array([], pa.int64())}))
    with pytest.raises(DataError, match=r"1\.parquet has no column 'user_id'; its columns are user; name it as"):
        _keys(tmp_path / "2", pa.table({"user_id": [1]}), pa.table({"user": [1]}))
    with pytest.raises(DataError, match=r"'user_id' is string, but users of the dataset are int64; convert it"):
        _keys(tmp_path / "3", pa.table({"user_id": ["1"]}))
    with pytest.raises(DataError, match=r"'user_id' has 1 null ids in 2 rows"):
        _keys(tmp_path / "4", pa.table({"user_id": [1, None]}))
