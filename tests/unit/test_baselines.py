"""Baselines against their formulas, written out densely."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recray import storage
from recray.batches import questions
from recray.data.prepared import PreparedDataset
from recray.records import DatasetRecord, Shard
from recray.retrieval import baselines

N = 12  # item ids 2..11


def _table(rows: list[list[int]], num_targets: list[int], first_time: int) -> pa.Table:
    return pa.table(
        {
            "user": pa.array(range(2, 2 + len(rows)), pa.int32()),
            "item": pa.array(rows, pa.list_(pa.int32())),
            "time": pa.array([[first_time + i for i in range(len(row))] for row in rows], pa.list_(pa.int64())),
            "num_targets": pa.array(num_targets, pa.int32()),
        }
    )


@pytest.fixture
def dataset(tmp_path: Path) -> PreparedDataset:
    train = [[2, 3, 4], [3, 2], [5, 2, 6, 7], [8], [4, 9, 10]]
    tables = {
        "train": _table(train, [3, 2, 4, 1, 3], 0),
        "valid": _table([[2, 3, 4, 11, 10], [3, 2, 10]], [2, 1], 0),
        "test": _table([[2, 3, 4, 5], [8, 6], [4, 9, 10, 2, 3]], [1, 1, 2], 0),
    }
    shards = {}
    for name, table in tables.items():
        storage.write_table(f"{tmp_path}/{name}/a.parquet", table)
        events = sum(table["num_targets"].to_pylist())
        shards[name] = [Shard(file=f"{name}/a.parquet", rows=len(table), events=events, impressions=events)]
    counts = np.bincount(np.concatenate(train), minlength=N)
    storage.write_table(f"{tmp_path}/items.parquet", pa.table({"item": np.arange(N), "count": counts}))
    split = {"valid_start": 3, "test_start": 5, "last": 9}
    DatasetRecord(
        config={}, fingerprint="f", num_items=N, num_users=7, counts={}, shards=shards, seed=0, split=split
    ).write(str(tmp_path))
    return PreparedDataset.open(str(tmp_path))


def _brute(scores_N: np.ndarray, seen: list[int], k: int) -> list[int]:
    order = [i for i in sorted(range(2, N), key=lambda i: (-scores_N[i], i)) if i not in seen]
    return (order + [0] * k)[:k]


@pytest.mark.parametrize("filter_seen", [True, False])
@pytest.mark.parametrize("k", [3, 10])
def test_popularity_leaves_out_what_was_seen(dataset: PreparedDataset, filter_seen: bool, k: int) -> None:
    counts = dataset.item_counts()
    (table,) = dataset.iter_tables("test")
    (question,) = questions(table, 8, 5, "user")
    found = baselines.Popularity(counts)(question, k, filter_seen)
    seen = [[2, 3, 4], [8], [4, 9, 10]]
    assert found.tolist() == [_brute(counts, one if filter_seen else [], k) for one in seen]


def test_recent_popularity_counts_the_window_before_the_split(dataset: PreparedDataset) -> None:
    (table,) = dataset.iter_tables("test")
    (question,) = questions(table, 8, 5, "user")
    # Targets before 5 and from 3 on: 7 (train) and 11, 10 (valid); then by train count.
    recent = dataset.item_counts() / 100 + np.isin(np.arange(N), [7, 10, 11])
    found = baselines.recent_popularity(dataset, "test", 2)(question, 5, False)
    assert found[0].tolist() == _brute(recent, [], 5)


def test_item_filter_is_its_formula(dataset: PreparedDataset) -> None:
    r = np.zeros((5, N))
    for user, items in enumerate([[2, 3, 4], [3, 2], [5, 2, 6, 7], [8], [4, 9, 10]]):
        r[user, items] = 1
    to_users = (r / np.maximum(r.sum(0), 1)).T
    to_items = r / np.maximum(r.sum(1, keepdims=True), 1)
    x = np.zeros((3, N))
    for row, items in enumerate([[2, 3, 4], [8], [4, 9, 10]]):
        x[row, items] = 1
    scores = x @ to_users @ to_items
    (table,) = dataset.iter_tables("test")
    (question,) = questions(table, 8, 5, "user")
    found = baselines.ItemFilter(dataset)(question, 4, True)
    for row, seen in enumerate([[2, 3, 4], [8], [4, 9, 10]]):
        best = [i for i in _brute(scores[row], seen, 4) if scores[row, i] > 1e-9]
        assert found[row].tolist()[: len(best)] == best
