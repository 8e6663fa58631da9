"""A log that grows is prepared from the last dataset: the result is that of the whole log, up to the order of ids."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.growing_log import DAY, START
from helpers.inline_tasks import inline_prepare
from recray import inventory, lineage
from recray.artifacts import Run
from recray.config import Config, parse_config
from recray.data.dataset import PreparedDataset
from recray.errors import ConfigError
from recray.ids import NUM_RESERVED, SPLITS
from recray.records import DatasetRecord, Feature

_CONTEXT = {
    "device": {"kind": "categorical", "min_count": 3},
    "tags": {"kind": "list"},
    "place": {"kind": "categorical", "hash_buckets": 16},
    "price": {"kind": "numeric"},
    "hour": {"kind": "numeric", "scale": "quantiles", "quantiles": 4},
}


def _events(rng: np.random.Generator, count: int, labelled: bool) -> pa.Table:
    """Events over ten days, roughly in order, with duplicates and late ones, new items and users every day, in text keys."""
    day = np.sort(rng.uniform(0, 10, count))
    late = rng.random(count) < 0.05
    time = START + ((day - late * rng.uniform(0, 3, count)) * DAY).astype(np.int64)
    user = rng.integers(0, 20 + 5 * day)
    item = rng.integers(2 * day, 15 + 4 * day)
    table = {
        "user_id": [f"u{one}" for one in user],
        "item_id": [f"i{one}" for one in item],
        "timestamp": time,
        "device": [
            None if one == 4 else f"d{one + int(at)}" for one, at in zip(rng.integers(0, 5, count), day, strict=True)
        ],
        "tags": [[f"t{one}" for one in rng.integers(0, 4 + int(at), 2)] for at in day],
        "place": rng.integers(0, 40, count),
        "price": rng.exponential(5 + day),
        "hour": rng.uniform(0, 24, count),
    }
    if labelled:
        table["label"] = rng.integers(0, 2, count)
    found = pa.table(table)
    again = rng.integers(0, count, count // 20)  # in a later file, or the same
    return pa.concat_tables([found, found.take(again)]).take(
        np.sort(np.concatenate([np.arange(count), again])).argsort()
    )


def _config(folder: Path, **values: Any) -> Config:
    labelled = values.pop("labelled", False)
    data = {
        "path": str(folder / "clicks"),
        "items": str(folder / "items.parquet"),
        "timestamp_unit": "us",
        "append": True,
        "shard_events": 300,
        "columns": {"timestamp": "timestamp", "context": list(_CONTEXT)} | ({"label": "label"} if labelled else {}),
        "context_features": _CONTEXT,
        "split": {"kind": "temporal", "valid": "1d", "test": "1d"},
    }
    return parse_config({"run": {"name": "r", "output": str(folder / "runs")}, "data": data | values})


def _write(folder: Path, events: pa.Table, cuts: list[int], first: int = 0) -> None:
    (folder / "clicks").mkdir(parents=True, exist_ok=True)
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        pq.write_table(events.slice(start, stop - start), folder / "clicks" / f"{first + number:03}.parquet")
    keys = [f"i{one}" for one in range(60)]
    pq.write_table(
        pa.table({"item_id": keys, "kind": [f"k{len(key) + int(key[1:]) % 7}" for key in keys]}),
        folder / "items.parquet",
    )


def _values(ids: Any, feature: Feature) -> Any:
    """What ids of a feature stand for."""
    if isinstance(ids, list):
        return [_values(one, feature) for one in ids]
    if feature.kind == "numeric":
        return round(ids * feature.std + feature.mean, 2) if abs(ids) < 9.9 else "cut off"
    if feature.vocabulary is None or ids < NUM_RESERVED:
        return ids
    return feature.vocabulary[ids - NUM_RESERVED]


def _plain(uri: str, numbers: bool = True) -> dict[str, Any]:
    """A dataset in keys and values, without ids. numbers: with features that are scaled to the log."""
    dataset = PreparedDataset.open(uri)
    record = dataset.record
    refit = dataset.refitted()
    users = dict(zip(*(refit.user_keys()[name].to_pylist() for name in ("user_id", "user")), strict=True))
    items = refit.items()
    keys = items["item"].to_pylist()
    features = {f.column: f for f in record.features if numbers or (f.kind != "numeric" and f.edges is None)}
    out: dict[str, Any] = {
        "known": set(keys[NUM_RESERVED : record.num_items]),
        "new": set(keys[record.num_items :]),
        "vocabulary": {
            name: (set(f.vocabulary[: f.cardinality - 2]), set(f.vocabulary[f.cardinality - 2 :]))
            for name, f in features.items()
            if f.vocabulary
        },
        "counts": {name: n for name, n in record.counts.items() if n},
        "split": record.split,
        "users": set(users.values()),
    }
    for name in items.column_names:
        values = items[name].to_pylist()[NUM_RESERVED:]
        values = [_values(one, features[name]) for one in values] if name in features else values
        out[f"items {name}"] = dict(zip(keys[NUM_RESERVED:], values, strict=True))
    shards = {split: [shard.file for shard in record.shards[split]] for split in SPLITS}
    for split, files in (shards | {f"early-{split}": record.early.get(split, []) for split in SPLITS}).items():
        for row in (row for file in files for row in refit.read_file(file).to_pylist()):
            row["item"] = [keys[one] if one >= NUM_RESERVED else one for one in row["item"]]
            row |= {name: _values(row[name], features[name]) for name in features if name in row}
            out[f"{split} {users[row['user']]}"] = {
                name: value
                for name, value in row.items()
                if name != "user" and (name in features or not name.startswith("context_"))
            }
    return out


def _kept(old: DatasetRecord, old_uri: str, new_uri: str) -> None:
    """Ids and encodings of the old dataset hold in the new one."""
    before, after = PreparedDataset.open(old_uri), PreparedDataset.open(new_uri)
    a, b = before.items()["item"].to_pylist(), after.items()["item"].to_pylist()
    assert b[: len(a)] == a
    users = [
        dict(zip(*(one.user_keys()[n].to_pylist() for n in ("user", "user_id")), strict=True))
        for one in (before, after)
    ]
    assert users[0].items() <= users[1].items() and len({*users[1].values()}) == len(users[1])
    assert max(users[1].values()) + 1 == after.record.num_users
    for was, now in zip(before.record.features, after.record.features, strict=True):
        assert (was.mean, was.std, was.edges) == (now.mean, now.std, now.edges)
        known = (was.vocabulary or [])[: max(was.cardinality - NUM_RESERVED, 0)]
        assert (now.vocabulary or [])[: len(known)] == known


_KINDS: list[dict[str, Any]] = [
    {},
    {"split": {"kind": "temporal", "valid": 0.1, "test": 0.1}},
    {
        "split": {"kind": "temporal", "valid": "6h", "test": "12h", "start": "2023-11-16T00:00:00Z"},
        "min_user_events": 2,
    },
    {"split": {"kind": "leave_last"}, "min_item_events": 3},
    {"min_item_events": 2, "min_history": 2},
    {"min_item_events": 3, "min_user_events": 3, "k_core": True},
    {"labelled": True, "drop_duplicates": False},
]


@pytest.mark.parametrize("seed", [pytest.param(one, marks=pytest.mark.slow if one >= 7 else ()) for one in range(30)])
def test_an_appended_dataset_is_one_of_the_whole_log(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    values = dict(_KINDS[seed % len(_KINDS)])
    events = _events(rng, int(rng.integers(600, 1500)), values.get("labelled", False))
    # The first preparation has at least six days.
    cuts = [0, *sorted(int(len(events) * one) for one in rng.uniform(0.65, 1, rng.integers(1, 4))), len(events)]
    config = _config(tmp_path, **values)
    records = []
    for stop in range(1, len(cuts)):
        _write(tmp_path, events, cuts[stop - 1 : stop + 1], stop - 1)
        records.append(inline_prepare(config))
    uris = [f"{config.run_uri}/dataset/{one.identity}" for one in records]
    fresh = _config(tmp_path, **values).model_copy(update={"run": config.run.model_copy(update={"name": "fresh"})})
    whole = inline_prepare(fresh)
    assert len(whole.parents) == 1 and [len(one.parents) for one in records] == [1, *[2] * (len(cuts) - 2)]
    assert _plain(uris[-1], numbers=False) == _plain(f"{fresh.run_uri}/dataset/{whole.identity}", numbers=False)
    moved = values.get("split", {}).get("valid") == 0.1  # a late event moves boundaries by shares back
    for old, before, after in zip(records, uris[:-1], uris[1:], strict=False):
        if not moved:
            _kept(old, before, after)
    # Numbers are scaled as at first.
    _assert_numbers(uris[-1], f"{fresh.run_uri}/dataset/{whole.identity}")


def _assert_numbers(appended: str, whole: str) -> None:
    a, b = _plain(appended), _plain(whole)
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], dict) and "context_price" in a[key]:
            for x, y in zip(a[key]["context_price"], b[key]["context_price"], strict=True):
                assert "cut off" in (x, y) or x == pytest.approx(y, abs=0.02)


@pytest.fixture
def grown(tmp_path: Path) -> tuple[Config, pa.Table]:
    events = _events(np.random.default_rng(7), 900, False)
    config = _config(tmp_path)
    _write(tmp_path, events, [0, 400, 700])
    inline_prepare(config)
    return config, events


def test_only_new_files_are_read(
    grown: tuple[Config, pa.Table], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, events = grown
    from recray.data.sources import parquet

    read: list[str] = []
    original = parquet._read_piece
    monkeypatch.setattr(parquet, "_read_piece", lambda piece, plan: (read.append(piece.uri), original(piece, plan))[1])
    _write(tmp_path, events, [700, 900], 2)
    with caplog.at_level("INFO"):
        record = inline_prepare(config)
    assert [Path(one).name for one in read] == ["002.parquet"]
    assert "200 new events read, " in caplog.text
    assert inline_prepare(config).id == record.id and len(read) == 1  # the log has not grown
    node = lineage.lineage(Run(config).dataset().uri)
    assert [one.id for one in node.chain()] == [record.id, record.parents[1]] and node.complete
    # A side table that changed is read again, and no event.
    pq.write_table(pa.table({"item_id": ["i1"], "kind": ["k2"]}), tmp_path / "items.parquet")
    assert inline_prepare(config).parents[1] == record.id and len(read) == 1
    deleted = inventory.prune(config.run_uri, 1)
    assert len(deleted) == 2 and not any(Path(one.uri).exists() for one in deleted)


@pytest.mark.parametrize("change", ["rewritten", "before", "gone", "types"])
def test_a_log_that_changed_otherwise_is_read_whole(
    change: str, grown: tuple[Config, pa.Table], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, events = grown
    if change == "rewritten":
        _write(tmp_path, events, [300, 700], 1)
    elif change == "before":
        _write(tmp_path, events, [700, 900], 0)
        shutil.move(tmp_path / "clicks" / "000.parquet", tmp_path / "clicks" / "0000.parquet")
        _write(tmp_path, events, [0, 400], 0)
    elif change == "gone":
        (tmp_path / "clicks" / "000.parquet").unlink()
    else:
        table = events.slice(700, 200)
        place = table["place"].cast(pa.float64())
        _write(tmp_path, table.set_column(table.column_names.index("place"), "place", place), [0, 200], 2)
    record = inline_prepare(config)
    assert len(record.parents) == 1 and record.counts["events_read"] > 0
    wanted = (
        "column 'context_place' was int64 and is double"
        if change == "types"
        else "has changed, is gone, or comes behind"
    )
    assert wanted in caplog.text


def test_drift_is_told(grown: tuple[Config, pa.Table], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, events = grown
    table = events.slice(700, 200)
    dear = pa.array(np.full(len(table), 1e4))
    late = pa.array(np.arange(len(table)) * 1_000_000 + START + 11 * DAY)
    table = table.set_column(table.column_names.index("price"), "price", dear)
    table = table.set_column(table.column_names.index("timestamp"), "timestamp", late)
    after = events.slice(0, 50)  # validation and test
    days = pa.array(START + (np.where(np.arange(50) < 25, 12.5, 13.5) * DAY).astype(np.int64))
    after = after.set_column(after.column_names.index("timestamp"), "timestamp", days)
    _write(tmp_path, pa.concat_tables([table, after]), [0, 250], 2)
    inline_prepare(_config(tmp_path))
    assert "context feature 'price' has drifted: mean" in caplog.text


def test_what_cannot_be_appended() -> None:
    config = parse_config({"data": {"append": True, "split": {"kind": "given", "train_path": "a", "test_path": "b"}}})
    with pytest.raises(ConfigError, match=r"data.append = true does not go with data.split.kind = 'given'"):
        inline_prepare(config)
