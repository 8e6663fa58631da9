"""`recray init`: the roles of public logs' columns, and what it writes and asks."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.cli import recray_command
from helpers.inline_tasks import inline_prepare
from helpers.public_logs import LOGS, public_log
from recray.config import parse_config
from recray.data.infer import Inferred, inferred
from recray.errors import DataError
from recray.ids import SPLITS
from recray.records import DatasetRecord

ROLES = ("user", "item", "timestamp", "label", "weight", "split")


@pytest.mark.parametrize("name", LOGS)
def test_public_logs(name: str, tmp_path: Path) -> None:
    log = public_log(name)
    pq.write_table(log.table, tmp_path / "log.parquet")
    found = inferred(str(tmp_path / "log.parquet"))
    table = tomllib.loads(found.toml)
    config = parse_config(table)
    assert {role: table["data"]["columns"][role] for role in ROLES if role in table["data"]["columns"]} == log.roles
    assert table["data"].get("timestamp_unit") == log.unit
    assert config.model.name == log.model
    everything = "\n".join([found.toml, *found.notes, *found.questions])
    assert [part for part in log.said if part not in everything] == []
    assert bool(found.questions) == ("?" in log.roles.values())


def test_prepare_accepts_what_is_written_for_public_logs(tmp_path: Path) -> None:
    for number, name in enumerate(LOGS):
        log = public_log(name)
        pq.write_table(log.table, tmp_path / f"{number}.parquet")
        table = tomllib.loads(inferred(str(tmp_path / f"{number}.parquet")).toml)
        table["run"]["output"] = str(tmp_path / str(number))
        if "?" in log.roles.values():
            with pytest.raises(DataError, match=r"'\?'"):
                inline_prepare(parse_config(table))
        else:
            record = inline_prepare(parse_config(table))
            assert all(record.counts[f"events_{split}"] for split in SPLITS), name


# ---- logs made for one question


def _log(path: Path, rows: int = 600, seed: int = 0, **columns: Any) -> str:
    """A log with user_id, item_id and ts (seconds) unless `columns` says otherwise; None leaves a column out."""
    rng = np.random.default_rng(seed)
    usual = {
        "user_id": rng.integers(0, 30, rows),
        "item_id": rng.integers(0, 50, rows),
        "ts": rng.integers(0, 10_000_000, rows) + 1_600_000_000,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: v for name, v in (usual | columns).items() if v is not None}), path)
    return str(path)


def _columns(found: Inferred) -> dict[str, Any]:
    return tomllib.loads(found.toml)["data"]["columns"]


def _prepared(found: Inferred, folder: Path) -> DatasetRecord:
    table = tomllib.loads(found.toml)
    table["run"]["output"] = str(folder / "runs")
    return inline_prepare(parse_config(table))


def test_features_of_side_tables_and_what_is_left_out(tmp_path: Path) -> None:
    rows = np.arange(1_000)
    events = _log(
        tmp_path / "e.parquet",
        1_000,
        user_id=None,
        item_id=None,
        ts=None,
        visitorId=[f"u{i % 50}" for i in rows],
        click_article_id=rows % 97,
        eventTime=(1_600_000_000 + rows) * 1_000,
        device=["phone", "laptop"] * 500,
        position=rows / 7,
        trace=[f"t{i}" for i in rows],
        nothing=pa.nulls(1_000, pa.int64()),
        picture=pa.array([b"\xff\xfe"] * 1_000, pa.binary()),
    )
    keys = np.arange(97)
    items = _log(
        tmp_path / "i.parquet",
        97,
        user_id=None,
        item_id=None,
        ts=None,
        click_article_id=keys,
        topic=["a"] * 50 + ["b"] * 47,
        tags=[["x"]] * 97,
        price=keys / 3,
        embedding=pa.array(np.random.default_rng(0).normal(size=(97, 16)).tolist(), pa.list_(pa.float32())),
        text=["a long text of many words that nobody would call a category"] * 40 + ["another"] * 57,
        slug=[f"article-{i}" for i in keys],
    )
    found = inferred(events, items=items)
    config = parse_config(tomllib.loads(found.toml))
    columns = config.data.columns
    assert (columns.user, columns.item, columns.timestamp) == ("visitorId", "click_article_id", "eventTime")
    assert config.data.timestamp_unit == "ms"
    assert config.data.split.kind == "temporal"
    kinds = {name: feature.kind for name, feature in config.data.item_features.items()}
    assert kinds == {"topic": "categorical", "tags": "list", "price": "numeric"}
    assert "candidates: device\n" in found.toml
    for left in (
        "trace (every row has its own value)",
        "nothing (no values)",
        "picture (binary, holds bytes that are not UTF-8 text)",
        "embedding (lists of numbers: a vector)",
        "text (free text)",
        "slug (every row has its own value)",
    ):
        assert left in found.toml
    assert any(note.startswith("position: by name known only after") for note in found.notes)
    assert not found.questions


def test_a_side_table_that_does_not_join_is_a_question(tmp_path: Path) -> None:
    events = _log(tmp_path / "e.parquet")
    none = {"user_id": None, "ts": None}
    other = _log(tmp_path / "a.parquet", 50, **none, item_id=None, sku=np.arange(50))
    text = _log(tmp_path / "b.parquet", 50, **none, item_id=[str(i) for i in range(50)])
    twice = _log(tmp_path / "c.parquet", 50, **none, item_id=np.arange(50) // 2)
    assert "no column item_id to join on" in inferred(events, items=other).questions[0]
    assert "item_id is int64 in the log and string in" in inferred(events, items=text).questions[0]
    assert "several rows for one item_id" in inferred(events, items=twice).questions[0]


@pytest.mark.parametrize("name", ["shown_at", "occurred", "viewed_on", "x", "когда", "a\nb", 'q"\x7f'])
@pytest.mark.parametrize("kind", ["timestamp", "date", "s", "ms", "us"])
def test_the_only_time_is_the_time_whatever_its_name(name: str, kind: str, tmp_path: Path) -> None:
    seconds = np.random.default_rng(1).integers(0, 10_000_000, 600) + 1_600_000_000
    values: Any = seconds * {"s": 1, "ms": 1_000}.get(kind, 1_000_000)
    if kind == "timestamp":
        values = pa.array(values).cast(pa.timestamp("us", "America/New_York"))
    if kind == "date":
        values = pa.array((seconds // 86_400).astype(np.int32)).cast(pa.date32())
    found = inferred(_log(tmp_path / "e.parquet", ts=None, **{name: values}))
    assert _columns(found)["timestamp"] == name and not found.questions
    assert tomllib.loads(found.toml)["data"]["timestamp_unit"] == (kind if kind in ("s", "ms", "us") else "auto")
    assert _prepared(found, tmp_path).has_time


def test_an_unclear_role_is_written_as_a_question(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    events = _log(
        tmp_path / "e.parquet",
        user_id=None,
        item_id=None,
        who=rng.integers(0, 30, 600),
        what=rng.integers(0, 50, 600),
        event_id=np.arange(600),
    )
    found = inferred(events)
    assert (_columns(found)["user"], _columns(found)["item"]) == ("?", "?")
    assert 'user = "?"   # candidates: what, who, event_id' in found.toml
    assert [question[:26] for question in found.questions] == [
        "which column is the user? ",
        "which column is the item? ",
    ]
    with pytest.raises(DataError, match=r"'\?'"):
        _prepared(found, tmp_path)
    named = inferred(events, roles={"user": "who", "item": "what"})
    assert not named.questions and _prepared(named, tmp_path).counts["events_read"] == 600
    with pytest.raises(DataError, match="no column WHO for role user; did you mean who"):
        inferred(events, roles={"user": "WHO"})


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"target": [1, 2, 3, 4, 5] * 120}, "target is not taken for the label: it runs from 1 to 5"),
        ({"clicked": [1] * 600}, "clicked is not taken for the label: it is 1 in every sampled row"),
        ({"label": pa.array([0, 1, None] * 200)}, "label is not taken for the label: 200 of 600 sampled rows are null"),
        ({"stars": [1, 5] * 300}, "stars holds ratings from 1 to 5, which are no click label"),
        ({"weight": [-1.0, 2.0] * 300}, "weight is not taken for the weight: it holds negative"),
        ({"nonclk": [0, 1] * 300}, "nonclk: by name known only after"),
        ({"dwell_seconds": [3, 9, 27] * 200}, "dwell_seconds: by name known only after"),
        ({"subset": ["train", "test", "val"] * 200}, "subset looks like a split"),
    ],
)
def test_what_is_no_label_no_weight_and_no_split_is_said(columns: dict[str, Any], said: str, tmp_path: Path) -> None:
    found = inferred(_log(tmp_path / "e.parquet", **columns))
    assert set(_columns(found)) == {"user", "item", "timestamp", "context"}
    assert any(note.startswith(said) for note in found.notes), found.notes
    _prepared(found, tmp_path)


@pytest.mark.parametrize("values", [[0, 1] * 300, [True, False] * 300, [0.0, 1.0] * 300])
def test_labels_by_their_values_suggest_a_ranker(values: list[Any], tmp_path: Path) -> None:
    found = inferred(_log(tmp_path / "e.parquet", is_click=values, rating=[1, 5] * 300))
    assert _columns(found)["label"] == "is_click"
    config = parse_config(tomllib.loads(found.toml))
    assert (config.model.name, config.loss.name, config.training.patience) == ("din", "bce", 3)
    assert _prepared(found, tmp_path).counts["negatives_train"] > 0


def test_given_roles_that_cannot_play_them_are_questions(tmp_path: Path) -> None:
    events = _log(tmp_path / "e.parquet", rating=[1, 5] * 300, w=[-1.0, 1.0] * 300, f=np.arange(600) / 2)
    for role, name, said in (
        ("label", "rating", "cannot be the label: it runs from 1 to 5"),
        ("weight", "w", "cannot be the weight"),
        ("user", "f", "f looks like the user, but it holds values that are not int64"),
    ):
        found = inferred(events, roles={role: name})
        assert said in found.questions[0] and _columns(found)[role] == name


def test_iso_text_is_a_time_and_other_text_is_a_question(tmp_path: Path) -> None:
    moments = [np.datetime64(1_600_000_000 + 977 * i, "s") for i in range(600)]
    found = inferred(_log(tmp_path / "a.parquet", ts=None, occurred=[str(moment) for moment in moments]))
    assert _columns(found)["timestamp"] == "occurred" and not found.questions
    assert _prepared(found, tmp_path).has_time
    american = [moment.item().strftime("%m/%d/%Y %I:%M:%S %p") for moment in moments]
    found = inferred(_log(tmp_path / "b.parquet", ts=None, occurred=american))
    assert _columns(found)["timestamp"] == "occurred"
    assert "occurred holds text such as '09/13/2020 12:26:40 PM'" in found.questions[0]
    with pytest.raises(DataError, match="occurred"):
        _prepared(found, tmp_path)


def test_several_files_partitions_and_rows_are_sampled(tmp_path: Path) -> None:
    """The first file holds one class and one day; the last ones hold what decides."""
    for day in range(40):
        folder = tmp_path / "log" / f"date=2024-01-{day % 28 + 1:02d}" / f"region={'eu' if day % 2 else 'us'}"
        _log(folder / f"p{day}.parquet", 100, day, clicked=[0, 1] * 50 if day > 20 else [0] * 100)
    found = inferred(str(tmp_path / "log"))
    assert _columns(found)["label"] == "clicked"
    assert "# Folders that are columns, too: date=2024-01-01, region=us" in found.toml
    assert "candidates: date, region" in found.toml and "of 40 files looked at" in found.toml
    counts = _prepared(found, tmp_path).counts
    assert counts["events_read"] == 4_000 and counts["negatives_test"] > 0


@pytest.mark.parametrize("days", [1, 2, 3, 7, 400])
def test_a_split_that_leaves_events_where_times_are_days(days: int, tmp_path: Path) -> None:
    day = pa.array((np.random.default_rng(2).integers(0, days, 2_000) + 19_000).astype(np.int32)).cast(pa.date32())
    rng = np.random.default_rng(0)
    events = _log(
        tmp_path / "e.parquet", 2_000, user_id=rng.integers(0, 30, 2_000), item_id=rng.integers(0, 500, 2_000), ts=day
    )
    found = inferred(events)
    config = parse_config(tomllib.loads(found.toml))
    expected = {1: "leave_last", 2: "leave_last", 3: "1d", 7: "1d", 400: 0.1}[days]
    assert expected in (config.data.split.kind, config.data.split.test)
    counts = _prepared(found, tmp_path).counts
    assert counts["events_valid"] and counts["events_test"]


def test_positions_within_users_and_in_the_log(tmp_path: Path) -> None:
    rows = np.arange(600)
    within = inferred(_log(tmp_path / "a.parquet", user_id=rows // 20, ts=None, timestamp=rows % 20))
    whole = inferred(_log(tmp_path / "b.parquet", ts=None, timestamp=rows))
    for found, kind in ((within, "leave_last"), (whole, "temporal")):
        config = parse_config(tomllib.loads(found.toml))
        assert (config.data.timestamp_unit, config.data.split.kind) == ("order", kind)
        _prepared(found, tmp_path)
    few = inferred(_log(tmp_path / "c.parquet", 2, user_id=[1, 2], item_id=[3, 4], ts=None, timestamp=[0, 1]))
    assert (_columns(few)["user"], _columns(few)["item"]) == ("user_id", "item_id")


def test_models_that_fit_the_log(tmp_path: Path) -> None:
    once = inferred(_log(tmp_path / "a.parquet", user_id=np.arange(600) // 2))
    often = inferred(_log(tmp_path / "b.parquet"))
    no_time = inferred(_log(tmp_path / "c.parquet", ts=None))
    for found, model in ((once, "two_tower"), (often, "sasrec"), (no_time, "two_tower")):
        config = parse_config(tomllib.loads(found.toml))
        assert (config.model.name, config.training.patience, config.optim.warmup_steps) == (model, 3, 100)
    assert tomllib.loads(no_time.toml)["model"]["history"] == "others"


def test_broken_times_and_ids_are_questions(tmp_path: Path) -> None:
    seconds = np.arange(600) * 1_000 + 1_600_000_000
    sentinel = np.where(np.arange(600) == 7, 2**33, seconds)
    null = pa.array([None, *range(599)])
    for columns, said in (
        ({"ts": sentinel}, "ts holds 8589934592"),
        ({"ts": pa.array([None, *seconds[1:].tolist()])}, "1 null timestamps in 600 rows"),
        ({"user_id": null}, "user_id looks like the user, but it has 1 null ids in 600 rows"),
        (
            {"user_id": np.where(np.arange(600) == 7, np.nan, 1.0)},
            "user_id looks like the user, but it has 1 NaN ids in 600",
        ),
        ({"user_id": np.arange(600) / 2}, "user_id looks like the user, but it holds values that are not int64"),
    ):
        found = inferred(_log(tmp_path / "e.parquet", **columns))
        assert said in "".join(found.questions)
        with pytest.raises(DataError):
            _prepared(found, tmp_path)


@pytest.mark.parametrize("given", [{}, {"timestamp": "ts"}])
def test_times_of_several_units_are_a_question(tmp_path: Path, given: dict[str, str]) -> None:
    seconds = np.arange(600) * 1_000 + 1_600_000_000
    found = inferred(
        _log(tmp_path / "e.parquet", ts=np.where(np.arange(600) % 2, seconds, seconds * 1000)), roles=given
    )
    assert found.questions == [
        "ts holds times of several units (s in 50% of the rows, ms in 50% of the rows); write them in one, "
        "or set data.timestamp_unit = 'order' if they are positions"
    ]


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.table(
        [pa.array([1, 2]), pa.array([1, 2]), pa.array([3, 4]), pa.array([5, 6])], ["user_id", "item_id", "x", "x"]
    )
    pq.write_table(table, tmp_path / "e.parquet")
    assert "two columns are called x: rename one" in inferred(str(tmp_path / "e.parquet")).questions[-1]


def test_the_command_prints_the_file_and_asks_on_stderr(tmp_path: Path) -> None:
    clear, unclear = (
        _log(tmp_path / "a.parquet", rating=[1, 2] * 300),
        _log(tmp_path / "b.parquet", user_id=None, who=[1, 2] * 300),
    )
    done = recray_command("init", clear)
    assert done.code == 0 and parse_config(tomllib.loads(done.out)) and "init: rating holds ratings" in done.err
    done = recray_command("init", unclear)
    assert done.code == 2 and tomllib.loads(done.out)["data"]["columns"]["user"] == "?"
    assert "init: which column is the user? Candidates: who. " in done.err
    done = recray_command("init", unclear, "--user", "who", "--time", "ts", "--weight", "who")
    assert done.code == 0 and tomllib.loads(done.out)["data"]["columns"]["weight"] == "who"
