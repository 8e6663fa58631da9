"""The whole prepare stage on a local Ray."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from recray.config import Config
from recray.data import prepare as stage
from recray.data.dataset import PreparedDataset
from recray.data.prepare import prepare
from recray.data.sources.base import Source
from recray.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("ray_local")
DAY = 86_400_000_000
ITEMS = pa.table(
    {"item": np.arange(40), "item_brand": [f"b{i % 3}" for i in range(40)], "item_price": np.linspace(1, 9, 40)}
)


def log(num_events: int = 600, keys: str = "int", seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    users = rng.integers(0, 60, num_events)
    return pa.table(
        {
            "user": [f"u{u}" for u in users] if keys == "string" else users,
            "item": np.minimum(rng.geometric(0.1, num_events), 39),
            "time": rng.integers(0, 10 * DAY, num_events),
            "order": np.arange(num_events),
            "context_hour": rng.integers(0, 24, num_events),
        }
    )


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """prepare(table, num_blocks, name=..., items=..., **data) -> the prepared dataset."""
    import ray.data

    def prepared(table: pa.Table, num_blocks: int = 1, *, name: str = "x", source=None, **data) -> PreparedDataset:
        config = Config.model_validate({"run": {"name": name, "output": str(tmp_path)}, "data": data})
        given = dict(source or {})
        size = max(1, -(-len(table) // num_blocks))
        events = given.pop("events", None) or ray.data.from_arrow(
            [table.slice(i * size, size) for i in range(num_blocks)]
        )
        made = Source(events, **{"num_events": len(table), "fingerprint": "f", **given})
        monkeypatch.setattr(stage, "registry", SimpleNamespace(load=lambda *_: SimpleNamespace(read=lambda *_: made)))
        prepare(config)
        return PreparedDataset.open(f"{config.run_uri}/dataset/current")

    return prepared


def digests(dataset: PreparedDataset) -> dict[str, str]:
    root = Path(dataset.uri)
    files = sorted(root.rglob("*.parquet"))
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("keys", ["int", "string"])
def test_same_bytes_whatever_the_blocks_and_the_shuffle(run, monkeypatch: pytest.MonkeyPatch, keys: str) -> None:
    options = {"shard_events": 200, "columns": {"context": ["hour"]}}
    few = run(log(keys=keys), 1, name="few", source={"items": ITEMS}, **options)
    many = run(log(keys=keys), 7, name="many", source={"items": ITEMS}, **options)
    assert len(few.record.shards["train"]) == 3
    assert digests(few) == digests(many)
    if keys == "int":
        monkeypatch.setattr(stage, "_SCANNED_EVENTS", 1)
        shuffled = run(log(keys=keys), 4, name="shuffled", source={"items": ITEMS}, **options)
        assert digests(shuffled) == digests(few)
        assert shuffled.record.counts == few.record.counts


def test_temporal_dataset(run, caplog) -> None:
    table = log()
    options = {
        "min_item_events": 5,
        "columns": {"context": ["hour"]},
        "context_features": {"hour": {"kind": "numeric"}},
    }
    dataset = run(table, 2, source={"items": ITEMS}, **options)
    record, counts = dataset.record, dataset.record.counts
    start = record.split["valid_start"]
    train = table.filter(pc.less(table["time"], start))
    frequent = {i: n for i, n in zip(*np.unique(train["item"].to_numpy(), return_counts=True), strict=True) if n >= 5}
    assert record.num_items == len(frequent) + 2
    assert counts["items_dropped_min_count"] == len(pc.unique(train["item"])) - len(frequent)
    assert counts["events_train"] + counts["train_events_dropped_rare_item"] == len(train)
    assert counts["events_train"] == dataset.item_counts().sum() == sum(s.events for s in record.shards["train"])
    assert counts["events_valid"] == pytest.approx(60, abs=1) and counts["events_test"] == pytest.approx(60, abs=1)

    items = dataset.items()
    assert items["item"].to_pylist()[2:] == sorted(frequent, key=lambda i: (-frequent[i], i))
    assert items.schema.field("item_brand").type == pa.int32() and items.schema.field("item_price").type == pa.float32()
    keys = dict(zip(dataset.user_keys()["user_id"].to_pylist(), dataset.user_keys()["user"].to_pylist(), strict=True))
    assert sorted(keys) == list(range(2, record.num_users))
    (test,) = dataset.iter_tables("test")
    unknown = 0
    for row in test.to_pylist():
        events = table.filter(pc.equal(table["user"], keys[row["user"]])).sort_by("time")
        rare = pc.and_(pc.less(events["time"], start), pc.invert(pc.is_in(events["item"], pa.array(list(frequent)))))
        events = events.filter(pc.invert(rare))
        assert row["time"] == events["time"].to_pylist()
        assert row["item"] == [
            items["item"].to_pylist().index(i, 2) if i in frequent else 1 for i in events["item"].to_pylist()
        ]
        assert row["num_targets"] == sum(t >= record.split["test_start"] for t in row["time"])
        assert len(row["context_hour"]) == len(row["time"])
        unknown += row["item"][-row["num_targets"] :].count(1)
    assert counts["unknown_targets_test"] == unknown
    assert record.columns == {field.name: str(field.type) for field in test.schema}
    assert not (Path(dataset.uri) / "_sorted").exists()

    caplog.set_level("INFO", "recray")
    again = run(table, 2, source={"items": ITEMS}, **options)
    assert "prepare: up to date" in caplog.text and again.record == record
    caplog.clear()
    other = run(table, 2, source={"items": ITEMS, "fingerprint": "changed"}, **options)
    assert other.record.fingerprint == "changed" and "prepare: new artefact" in caplog.text
    assert "its input changed" in caplog.text and other.record.identity != again.record.identity


def test_the_core_of_users_and_items(run, caplog) -> None:
    caplog.set_level("INFO", "recray")
    rng, n = np.random.default_rng(3), 1_200
    frame = pd.DataFrame(
        {"user": rng.integers(0, 150, n), "item": np.minimum(rng.zipf(1.4, n), 200), "time": np.arange(n) * DAY}
    )
    frame = pd.concat([frame, frame[:40]]).assign(order=np.arange(n + 40))
    options = {"shard_events": 300, "min_user_events": 4, "min_item_events": 5, "columns": {"timestamp": "time"}}
    dataset = run(pa.Table.from_pandas(frame, preserve_index=False), 2, k_core=True, **options)
    counts = dataset.record.counts
    train = frame[:n][frame["time"][:n] < dataset.record.split["valid_start"]]
    rounds = 0
    while True:
        left = train[train.groupby("user")["item"].transform("size") >= 4]
        left = left[left.groupby("item")["user"].transform("size") >= 5]
        rounds += 1
        if len(left) == len(train):
            break
        train = left
    assert rounds > 2 and len(train) > 100
    assert sorted(dataset.items()["item"].to_pylist()[2:]) == sorted(train["item"].unique())
    assert sorted(dataset.user_keys()["user"].to_pylist()) == sorted(train["user"].unique())
    assert counts["events_train"] == len(train) and counts["users_kept"] == train["user"].nunique()
    kept = frame[:n][frame["user"][:n].isin(train["user"])]
    known = kept["item"].isin(train["item"])
    kept = kept[known | (kept["time"] >= dataset.record.split["valid_start"])]
    again = kept[kept.duplicated(["user", "item"])]
    assert counts["repeats_test"] == (again["time"] >= dataset.record.split["test_start"]).sum() > 0
    assert counts["repeats_train"] == (again["time"] < dataset.record.split["valid_start"]).sum()
    assert counts["duplicates_dropped"] == 40
    assert "prepare: 40 duplicates dropped (same user, item and time)" in caplog.text
    assert f"{counts['users_dropped_min_count']} users with fewer than 4 train events dropped" in caplog.text


def test_given_draws_for_the_whole_log(run) -> None:
    splits = pa.array(np.where(np.arange(600) % 10 == 0, "test", "train"))
    table = log().append_column("split", splits)
    drawn = run(table, name="drawn", shard_events=150, split={"kind": "given", "valid": 0.2}).record.counts
    assert 70 < drawn["events_valid"] < 145
    # One validation event anywhere in the log, and nothing is drawn in any bucket.
    named = table.set_column(table.column_names.index("split"), "split", pa.array(["valid", *splits.to_pylist()[1:]]))
    counts = run(named, name="named", shard_events=150, split={"kind": "given", "valid": 0.2}).record.counts
    assert (counts["events_valid"], counts["events_test"]) == (1, 59)


@pytest.mark.parametrize(
    ("change", "data", "error", "message"),
    [
        ({}, {"split": {"test_start": "2050-01-01T00:00:00Z"}}, DataError, "no events fall in .*Set data.split.valid"),
        ({}, {"min_user_events": 1000}, DataError, r"no events are left of 600: lower data.min_user_events \(1000\)"),
        ({}, {"min_item_events": 1000}, DataError, "no item has 1000 train events"),
        (
            {"items": pa.table({"item": ["1", "2"]})},
            {},
            DataError,
            "item ids are int64 in the log but string in data.items",
        ),
        ({"items": ITEMS}, {"item_features": {"colour": {"kind": "list"}}}, DataError, "no column 'colour'.*brand"),
        ({}, {"item_features": {"brand": {"kind": "list"}}}, DataError, "there is no data.items table"),
        ({}, {"context_features": {"device": {"kind": "list"}}}, DataError, "context feature 'device' is not read"),
        ({}, {"split": {"kind": "given"}}, DataError, "nothing names the splits"),
        ({"has_time": False}, {"split": {"test": "1d"}}, ConfigError, "data.split.test needs times"),
    ],
)
def test_errors_leave_nothing_behind(run, tmp_path: Path, change: dict, data: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        run(log(), source=change, **data)
    assert type(caught.value) is error and "Traceback" not in str(caught.value)
    assert not (tmp_path / "x" / "dataset").exists()


def test_no_events_and_errors_of_the_source(run) -> None:
    import ray.data

    with pytest.raises(DataError, match="the log holds no events"):
        run(log().slice(0, 0))

    def broken(batch: pa.Table) -> pa.Table:
        raise DataError("file.parquet: column 'user' has 3 null ids")

    events = ray.data.from_arrow(log()).map_batches(broken, batch_format="pyarrow")
    with pytest.raises(DataError, match=r"^file.parquet: column 'user' has 3 null ids$") as caught:
        run(log(), source={"events": events})
    assert type(caught.value) is DataError
