"""Sorted events of a bucket, and their rows."""

import numpy as np
import pyarrow as pa
import pytest

from recray.config import ColumnsConfig, DataConfig, SplitConfig
from recray.data import user_rows
from recray.data.hashing import hash_keys
from recray.data.split import Boundaries, Draw
from recray.ids import SPLITS


def log(*events: tuple) -> pa.Table:
    """Events (user, item, time[, split]) in file order."""
    names = ["user", "item", "time", "split"][: len(events[0])]
    columns = dict(zip(names, map(list, zip(*events, strict=True)), strict=True))
    return pa.table({**columns, "order": list(range(len(events)))})


def config(kind: str = "temporal", **data: object) -> DataConfig:
    return DataConfig.model_validate({"split": {"kind": kind}, **data})


def rows_of(part: user_rows.Bucket, name: str) -> list[tuple]:
    """(user key, times, number of targets) of the rows of a split."""
    rows = user_rows.rows(part.user_E, part.code_E, name, np.ones(len(part.user_E), bool))
    table = rows.table(part.keys, {"time": part.table["time"].combine_chunks()}, {})
    return list(zip(*(table[c].to_pylist() for c in ("user", "time", "num_targets")), strict=True))


def test_hashes_are_fixed_for_ever() -> None:
    # splitmix64 of 0 is the first output of the published generator seeded with 0.
    assert hash_keys(pa.chunked_array([pa.array([0, 1])])).tolist()[0] == 0xE220A8397B1DCDAF
    strings = hash_keys(pa.chunked_array([pa.array(["a", "b"]), pa.array(["a"])]))
    assert strings[0] == strings[2] != strings[1]
    spread = np.bincount(hash_keys(pa.chunked_array([np.arange(-5_000, 5_000)])) % np.uint64(10))
    assert spread.min() > 850


def test_events_are_sorted_by_user_time_and_file_order() -> None:
    table = log((9, 1, 5), (3, 2, 7), (9, 3, 4), (3, 4, 7), (9, 5, 4))
    ordered, dropped = user_rows.sort_users(table, config(), has_time=True)
    assert ordered["user"].to_pylist() == [3, 3, 9, 9, 9]
    assert ordered["item"].to_pylist() == [2, 4, 3, 5, 1]
    assert set(dropped.values()) == {0}


def test_duplicates_and_rare_users_leave() -> None:
    table = log(("b", 1, 5), ("b", 1, 5), ("a", 1, 1), ("b", 1, 6), ("a", 2, 1), ("c", 1, 1), ("c", 1, 1))
    ordered, dropped = user_rows.sort_users(table, config(min_user_events=2), has_time=True)
    assert ordered["user"].to_pylist() == ["a", "a", "b", "b"]
    assert ordered["order"].to_pylist() == [2, 4, 0, 3]
    assert {name: n for name, n in dropped.items() if n} == {
        "duplicates_dropped": 2,
        "users_dropped_min_count": 1,
        "events_dropped_min_count": 1,
    }
    kept, _ = user_rows.sort_users(table, config(drop_duplicates=False), has_time=True)
    assert len(kept) == len(table)


def test_events_before_the_start_are_counted_and_gone() -> None:
    day = 86_400_000_000
    table = log((1, 1, 0), (1, 2, day), (2, 3, day - 1), (1, 4, 2 * day))
    start = SplitConfig.model_validate({"start": "1970-01-02T00:00:00Z"})
    ordered, dropped = user_rows.sort_users(table, DataConfig(split=start), has_time=True)
    assert ordered["item"].to_pylist() == [2, 4] and dropped["events_before_start"] == 2


def test_without_times_an_event_is_a_pair() -> None:
    table = log((1, 1, 0), (1, 1, 1), (1, 2, 2))
    assert user_rows.sort_users(table, config(), has_time=False)[1]["duplicates_dropped"] == 1
    ordered = config(columns=ColumnsConfig(timestamp="position"))
    assert user_rows.sort_users(table, ordered, has_time=False)[1]["duplicates_dropped"] == 0


def test_temporal_rows() -> None:
    table, _ = user_rows.sort_users(
        log((1, 1, 1), (1, 1, 2), (1, 1, 5), (1, 1, 9), (2, 1, 1), (3, 1, 5), (3, 1, 6), (4, 1, 20)), config(), True
    )
    part = user_rows.Bucket.of(table, Boundaries(5, 8, 10), None)
    assert rows_of(part, "train") == [(1, [1, 2], 2), (2, [1], 1)]
    assert rows_of(part, "valid") == [(1, [1, 2, 5], 1), (3, [5, 6], 2)]
    assert rows_of(part, "test") == [(1, [1, 2, 5, 9], 1)]


def test_leave_last_rows() -> None:
    table, _ = user_rows.sort_users(
        log(*((u, 1, t) for u, n in [(1, 4), (2, 2), (3, 3)] for t in range(n))), config(), True
    )
    part = user_rows.Bucket.of(table, None, None)
    assert rows_of(part, "train") == [(1, [0, 1], 2), (2, [0, 1], 2), (3, [0], 1)]
    assert rows_of(part, "valid") == [(1, [0, 1, 2], 1), (3, [0, 1], 1)]
    assert rows_of(part, "test") == [(1, [0, 1, 2, 3], 1), (3, [0, 1, 2], 1)]


def test_given_rows_and_the_draw() -> None:
    events = [(1, i, i, "train") for i in range(400)] + [(1, 400, 0, "test"), (2, 1, 1, "train")]
    table, _ = user_rows.sort_users(log(*events), config("given"), True)
    part = user_rows.Bucket.of(table, None, None)
    assert rows_of(part, "valid") == [] and rows_of(part, "test") == [(1, [*range(400), 0], 1)]
    drawn = user_rows.Bucket.of(table, None, Draw(0.25, 1))
    (_, times, num_valid), *_ = rows_of(drawn, "valid")
    assert 70 < num_valid < 130 and sorted(times) == list(range(400))
    assert times[:-num_valid] == sorted(times[:-num_valid]) and times[-num_valid:] == sorted(times[-num_valid:])
    assert rows_of(drawn, "train")[0][1] == times[:-num_valid]


@pytest.mark.parametrize("kind", ["temporal", "leave_last"])
def test_no_leak_and_every_event_once(kind: str) -> None:
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "user": rng.integers(0, 300, 5_000),
            "item": rng.integers(0, 50, 5_000),
            "time": rng.integers(0, 1_000, 5_000),
            "order": np.arange(5_000),
        }
    )
    ordered, dropped = user_rows.sort_users(table, DataConfig(split=SplitConfig(kind=kind)), True)
    part = user_rows.Bucket.of(ordered, Boundaries(700, 850, 1_000) if kind == "temporal" else None, None)
    order_E = part.table["order"].to_numpy()
    time_E = part.table["time"].to_numpy()
    targets = []
    for name in SPLITS:
        rows = user_rows.rows(part.user_E, part.code_E, name, np.ones(len(part.user_E), bool))
        for row in range(len(rows.user_R)):
            index = rows.index[rows.offsets[row] : rows.offsets[row + 1]]
            assert (part.user_E[index] == rows.user_R[row]).all()
            assert (np.diff(time_E[index]) >= 0).all()  # so no entry is later than one after it
            targets.append(order_E[index[-rows.num_targets_R[row] :]])
    assert len(np.unique(np.concatenate(targets))) == sum(map(len, targets)) == 5_000 - dropped["duplicates_dropped"]
