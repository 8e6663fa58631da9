"""Sorted events of a bucket, and their rows."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recray.config import ColumnsConfig, DataConfig, SplitConfig
from recray.data import partition, user_rows
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


def test_duplicates_leave() -> None:
    table = log(("b", 1, 5), ("b", 1, 5), ("a", 1, 1), ("b", 1, 6), ("a", 2, 1), ("c", 1, 1), ("c", 1, 1))
    ordered, dropped = user_rows.sort_users(table, config(), has_time=True)
    assert ordered["user"].to_pylist() == ["a", "a", "b", "b", "c"]
    assert ordered["order"].to_pylist() == [2, 4, 0, 3, 5]
    assert {name: n for name, n in dropped.items() if n} == {"duplicates_dropped": 2}
    kept, _ = user_rows.sort_users(table, config(drop_duplicates=False), has_time=True)
    assert len(kept) == len(table)


@pytest.mark.parametrize("kind", ["temporal", "given"])
@pytest.mark.parametrize("columns", [(), ("label",), ("weight",), ("label", "weight")])
def test_the_strongest_of_duplicates_is_kept_whatever_the_order_of_rows(kind: str, columns: tuple[str, ...]) -> None:
    rng, n = np.random.default_rng(0), 2_000
    frame = pd.DataFrame({name: rng.integers(0, 8, n) for name in ("user", "item", "time")})
    frame["order"], frame["code"] = np.arange(n), rng.integers(0, 3, n) if kind == "given" else -1
    frame["split"] = np.array(["test", "train", "valid"])[(frame["code"] + 1) % 3]
    for name in columns:
        frame[name] = rng.integers(0, 3 - (name == "label"), n).astype(np.float32)
    order = [*columns, "code", "order"]
    best = frame.sort_values(order, ascending=[*[False] * len(columns), True, True])
    best = best.drop_duplicates(["user", "item", "time"])
    joined = frame.merge(best, on=["user", "item", "time"], suffixes=("", "_kept"))
    gone = joined[joined["order"] != joined["order_kept"]]
    weaker = gone["label"] < gone["label_kept"] if "label" in columns else gone["order"] < 0
    lighter = (gone["weight"] < gone["weight_kept"]) & ~weaker if "weight" in columns else weaker & False
    for seed in range(2):
        table = pa.Table.from_pandas(frame.sample(frac=1, random_state=seed).drop(columns="code"), preserve_index=False)
        ordered, dropped = user_rows.sort_users(table, config(kind), has_time=True)
        assert ordered["order"].to_pylist() == best.sort_values(["user", "code", "time", "order"])["order"].tolist()
        assert [dropped[name] for name in user_rows.DUPLICATES] == [len(gone), weaker.sum(), lighter.sum()]
    assert len(gone) > 500 and (not columns or weaker.any() or lighter.any())


def _plain_order(*columns: np.ndarray) -> list[int]:
    return sorted(range(len(columns[0])), key=lambda row: tuple(int(column[row]) for column in columns))


@pytest.mark.parametrize("span", [50, 2**40, 2**62])
@pytest.mark.parametrize("shuffled", [False, True])
def test_the_packed_sort_key_is_the_plain_order(span: int, shuffled: bool) -> None:
    rng, n = np.random.default_rng(0), 300
    user, code, time = rng.integers(0, 9, n), rng.integers(-1, 3, n).astype(np.int8), rng.integers(-span, span, n)
    time[::2] = time[0]
    order = rng.permutation(n) if shuffled else np.arange(n)
    found = user_rows._argsort(user, code, time, order)
    assert found.tolist() == _plain_order(user, code, time, order)
    twins = pd.DataFrame({"user": user, "time": time}).duplicated(keep=False).to_numpy()
    assert set(np.flatnonzero(twins)) <= set(user_rows._with_a_twin(user, time).tolist())


@pytest.mark.parametrize("first", [0, 1_700_000_000_000_000, 2**60])
@pytest.mark.parametrize("span", [1, 10, 70_000_001, 2**55])
def test_times_are_counted_in_the_bins_that_their_edges_say(tmp_path: Path, first: int, span: int) -> None:
    times = first + np.random.default_rng(0).integers(0, span, 3_000)
    times[:2] = first, first + span - 1
    pq.write_table(pa.table({"time": times}), tmp_path / "b.parquet")
    edges = partition.edges(first, first + span - 1)
    found = partition.histogram(str(tmp_path / "b.parquet"), 0, first, first + span - 1)
    counts = np.zeros(len(edges) - 1, int)
    counts[found["value"].to_numpy()] = found["n"].to_numpy()
    assert counts.tolist() == [
        int(n) for n in np.diff(np.searchsorted(np.sort(times), edges, side="left"))
    ] and counts.sum() == len(times)


@pytest.mark.parametrize("kind", ["temporal", "leave_last"])
@pytest.mark.parametrize("core", [False, True])
def test_users_with_few_train_events_leave_every_split(kind: str, core: bool) -> None:
    rng, n = np.random.default_rng(1), 1_500
    frame = pd.DataFrame({"user": rng.integers(0, 200, n), "item": rng.integers(0, 30, n), "time": np.arange(n)})
    table = pa.Table.from_pandas(frame.assign(order=np.arange(n)), preserve_index=False)
    ordered, _ = user_rows.sort_users(table, config(kind), has_time=True)
    boundaries = Boundaries(1_000, 1_200, 1_400) if kind == "temporal" else None
    items = pa.array(np.arange(0, 30, 2)) if core else None
    part = user_rows.Division(boundaries, None, 4, items).bucket(ordered)
    if boundaries is None:
        from_end = frame.groupby("user").cumcount(ascending=False)
        train = frame[(from_end > 1) | (frame.groupby("user")["user"].transform("size") < 3)]
    else:
        train = frame[frame["time"] < 1_000]
    counts = train[train["item"] % 2 == 0 if core else train["item"] >= 0].groupby("user").size()
    expected = sorted(counts[counts >= 4].index)
    assert part.keys.to_pylist() == expected and 10 < len(expected) < 200
    assert np.array(expected)[part.user_E].tolist() == part.table["user"].to_pylist()
    assert len(part.table) == frame["user"].isin(expected).sum() == len(part.code_E)
    everybody = user_rows.Division(boundaries, None).bucket(ordered)
    assert len(everybody.table) == n


def test_repeats_are_positive_events_of_an_item_chosen_before() -> None:
    rng, n = np.random.default_rng(2), 3_000
    frame = pd.DataFrame({"user": np.sort(rng.integers(0, 40, n)), "item": rng.integers(0, 60, n)})
    positive = rng.random(n) < 0.4
    earlier = frame.assign(chosen=positive.astype(int)).groupby(["user", "item"])["chosen"].cumsum() - positive
    found = user_rows.repeated(frame["user"].to_numpy(), pa.chunked_array([pa.array(frame["item"])]), positive)
    assert (found == (positive & (earlier > 0))).all() and 100 < found.sum() < positive.sum()
    assert not len(
        user_rows.repeated(np.zeros(0, int), pa.chunked_array([pa.array([], pa.string())]), np.zeros(0, bool))
    )


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
