"""`recray check`: each planted fault is found by its name, a healthy log has none, and figures are those of pandas."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.cli import recray_command
from recray.data.check import Checked, check

START, DAY, FILES = 1_700_006_400, 86_400, 10  # a midnight of 2023
GLOBO = Path("../shared/data/globo/clicks")


def _healthy(seed: int = 0) -> pd.DataFrame:
    """40 days of 30,000 events of 1,000 users on 400 items, with times in seconds and a label."""
    rng = np.random.default_rng(seed)
    n = 30_000
    item = np.minimum(rng.zipf(1.3, 2 * n), 10**6) % 400
    frame = pd.DataFrame(
        {
            "user_id": rng.integers(0, 1_000, n) + 10,
            "item_id": rng.permutation(400)[item[:n]] + 5_000,
            "timestamp": np.sort(START + rng.integers(0, 40 * DAY, n)),
            "clicked": rng.integers(0, 2, n),
            "price": rng.random(n),
        }
    )
    return frame.drop_duplicates(["user_id", "item_id"])


Frames = list[pd.DataFrame]


def _write(folder: Path, frames: Frames, **options: Any) -> None:
    folder.mkdir(exist_ok=True)
    for number, frame in enumerate(frames):
        pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), folder / f"{number:03d}.parquet", **options)


def _names(found: Checked) -> set[str]:
    return {one.name for one in found.problems}


# ---- each fault: it changes the frames, or the files after they are written


def _add(frames: Frames, rows: dict[str, Any]) -> None:
    n = max(len(one) for one in rows.values() if isinstance(one, np.ndarray))
    base = pd.concat([frames[4]] * (n // len(frames[4]) + 1)).iloc[:n].assign(**rows)
    frames[4] = pd.concat([frames[4], base.astype(frames[4].dtypes.to_dict())])


def _null_users(frames: Frames) -> None:
    frames[2] = frames[2].assign(user_id=frames[2].user_id.astype("Int64").where(np.arange(len(frames[2])) > 5))


def _null_times(frames: Frames) -> None:
    frames[2] = frames[2].assign(timestamp=frames[2].timestamp.astype("Int64").where(np.arange(len(frames[2])) > 5))


def _milliseconds(frames: Frames) -> None:
    frames[7] = frames[7].assign(timestamp=frames[7].timestamp * 1000)


def _zero_times(frames: Frames) -> None:
    frames[7] = frames[7].assign(timestamp=np.where(np.arange(len(frames[7])) < 9, 0, frames[7].timestamp))


def _text_ids(frames: Frames) -> None:
    frames[3] = frames[3].assign(item_id=frames[3].item_id.map("item {}".format))


def _no_item(frames: Frames) -> None:
    frames[3] = frames[3].drop(columns="item_id")


def _delivered_twice(frames: Frames) -> None:
    frames[8] = pd.concat([frames[8], frames[7]])


def _bot(frames: Frames) -> None:
    rng = np.random.default_rng(1)
    _add(frames, {"user_id": np.full(150, 7), "timestamp": START + 5 * DAY + 60 * np.arange(150)})
    frames[4].iloc[-150:, frames[4].columns.get_loc("item_id")] = 5_000 + rng.permutation(400)[:150]


def _placeholder_user(frames: Frames) -> None:
    rng = np.random.default_rng(2)
    items = np.concatenate([rng.permutation(400), rng.permutation(400)]) + 5_000
    times = rng.choice(40 * 24, 800, replace=False) * 3600 + rng.integers(0, 3600, 800)
    times = np.where(times // 3600 % 24 < 18, times, times - 6 * 3600)  # it sleeps
    _add(frames, {"user_id": np.zeros(800, int), "item_id": items, "timestamp": START + np.sort(times)})


def _one_item(frames: Frames) -> None:
    for number, frame in enumerate(frames):
        chosen = np.arange(len(frame)) % 4 == 0
        frames[number] = frame.assign(item_id=np.where(chosen, 5_001, frame.item_id))
        frames[number] = frames[number].drop_duplicates(["user_id", "item_id"])


def _missing_days(frames: Frames) -> None:
    for number, frame in enumerate(frames):
        day = (frame.timestamp - START) // DAY
        frames[number] = frame[(day < 17) | (day > 18)]


def _late_rows(frames: Frames) -> None:
    at = START + 60 * DAY + 3600 * np.arange(10)
    frames[9] = pd.concat([frames[9], frames[9].iloc[:10].assign(timestamp=at, item_id=5_000 + np.arange(10))])


def _future(frames: Frames) -> None:
    at = 4_000_000_000 + np.arange(10)
    frames[9] = pd.concat([frames[9], frames[9].iloc[:10].assign(timestamp=at)])


def _labels_of_one(frames: Frames) -> None:
    frames[:] = [frame.assign(clicked=1) for frame in frames]


def _bad_label(frames: Frames) -> None:
    frames[1] = frames[1].assign(clicked=frames[1].clicked + 1)


def _dates_only(frames: Frames) -> None:
    step = 7 * DAY // 2
    frames[:] = [frame.assign(timestamp=START + (frame.timestamp - START) // step * step) for frame in frames]


def _spaces(frames: Frames) -> None:
    frames[:] = [frame.assign(user_id=frame.user_id.map("u{}".format)) for frame in frames]
    frames[5] = frames[5].assign(user_id=frames[5].user_id + " ")


def _repeats(frames: Frames) -> None:
    frames[9] = pd.concat([frames[9], *(f.assign(timestamp=frames[9].timestamp.max()) for f in frames[:4])])


def _cold(frames: Frames) -> None:
    for number in (8, 9):
        frames[number] = frames[number].assign(item_id=frames[number].item_id + 1_000 * number)


CHANGES: dict[str, Callable[[Frames], None]] = {
    "null_ids": _null_users,
    "null_times": _null_times,
    "mixed_time_units": _milliseconds,
    "impossible_times": _zero_times,
    "type_drift": _text_ids,
    "missing_columns": _no_item,
    "duplicates": _delivered_twice,
    "bots": _bot,
    "skewed_users": _placeholder_user,
    "skewed_items": _one_item,
    "gaps": _missing_days,
    "stragglers": _late_rows,
    "future_times": _future,
    "one_label": _labels_of_one,
    "bad_labels": _bad_label,
    "coarse_times": _dates_only,
    "untidy_ids": _spaces,
    "repeats": _repeats,
    "cold_targets": _cold,
}
ROLES = {"user": "user_id", "item": "item_id", "timestamp": "timestamp", "label": "clicked"}


def _look(folder: Path) -> Checked:
    return check(str(folder), ROLES)


def _split(frame: pd.DataFrame, files: int = FILES) -> Frames:
    return [frame.iloc[rows] for rows in np.array_split(np.arange(len(frame)), files)]


def test_a_healthy_log_has_no_problem(tmp_path: Path) -> None:
    _write(tmp_path / "log", _split(_healthy()))
    found = check(str(tmp_path / "log"))  # its roles are found by type and name
    assert found.problems == []
    assert found.facts["rows"] == f"{len(_healthy()):,}"
    assert recray_command("check", str(tmp_path / "log")).code == 0


@pytest.mark.parametrize("name", CHANGES)
def test_a_planted_fault_is_found_and_nothing_else(name: str, tmp_path: Path) -> None:
    frames = _split(_healthy())
    CHANGES[name](frames)
    _write(tmp_path / "log", frames)
    found = _look(tmp_path / "log")
    assert _names(found) == {name}, [(one.name, one.what) for one in found.problems]
    assert all(one.cost and one.fix for one in found.problems)


def test_files_that_cost_time_or_cannot_be_read(tmp_path: Path) -> None:
    _write(tmp_path / "small", _split(_healthy(), 60))
    assert _names(_look(tmp_path / "small")) == {"small_files"}
    _write(tmp_path / "groups", _split(_healthy(), 4), row_group_size=300)
    assert _names(_look(tmp_path / "groups")) == {"small_row_groups"}
    _write(tmp_path / "broken", _split(_healthy()))
    (tmp_path / "broken" / "003.parquet").write_bytes(b"PAR1 and nothing more PAR1")
    found = _look(tmp_path / "broken")
    assert _names(found) == {"damaged_files", "gaps"}  # it held four days
    assert "003.parquet" in found.problems[0].what
    page = pa.array([bytes(1 << 20)] * 270)
    table = pa.Table.from_pandas(_healthy().iloc[:270], preserve_index=False).append_column("page", page)
    _write(tmp_path / "huge", _split(_healthy()))
    pq.write_table(table, tmp_path / "huge" / "zzz.parquet", use_dictionary=False, compression="zstd")
    assert "huge_row_groups" in _names(_look(tmp_path / "huge"))


def test_all_faults_in_one_folder(tmp_path: Path) -> None:
    together = [
        *("null_ids", "null_times", "mixed_time_units", "impossible_times", "duplicates", "bots", "skewed_users"),
        *("skewed_items", "gaps", "stragglers", "future_times", "bad_labels", "type_drift"),
    ]
    frames = _split(_healthy())
    for name in ("skewed_items", "skewed_users", "bots", "gaps", "duplicates", "stragglers", "future_times"):
        CHANGES[name](frames)
    for name in ("null_ids", "null_times", "mixed_time_units", "impossible_times", "bad_labels", "type_drift"):
        CHANGES[name](frames)
    parts = [part for frame in frames for part in np.array_split(np.arange(len(frame)), 4)]
    owners = [frame for frame in frames for _ in range(4)]
    _write(tmp_path / "log", [frame.iloc[rows] for frame, rows in zip(owners, parts, strict=True)], row_group_size=300)
    (tmp_path / "log" / "broken.parquet").write_bytes(b"PAR1 and nothing more PAR1")
    done = recray_command(
        *("--json", "check", str(tmp_path / "log"), "--user", "user_id", "--item", "item_id"),
        *("--time", "timestamp", "--label", "clicked"),
    )
    assert done.code == 1
    result = next(
        one for one in map(json.loads, done.out.splitlines()) if one["stage"] == "check" and one["event"] == "result"
    )
    names = {one["name"] for one in result["values"]["findings"] if one["level"] != "note"}
    wanted = {*together, "damaged_files", "small_files", "small_row_groups"}
    assert wanted - names == set()


def test_a_role_that_is_not_found_is_asked_for(tmp_path: Path) -> None:
    frame = _healthy().rename(columns={"item_id": "x7", "user_id": "user_id"}).drop(columns=["price", "clicked"])
    _write(tmp_path / "log", _split(frame.assign(x8=frame.x7 % 50)))
    done = recray_command("check", str(tmp_path / "log"))
    assert done.code == 1 and "unknown_role" in done.out and "--item COLUMN" in done.out
    assert recray_command("check", str(tmp_path / "log"), "--item", "x7").code == 0
    assert recray_command("check", str(tmp_path / "nothing")).code == 2


def test_the_split_is_that_of_the_configuration(tmp_path: Path) -> None:
    frame = _healthy()
    _write(tmp_path / "log", _split(frame))
    config = tmp_path / "my.toml"
    config.write_text(
        f'[data]\npath = "{tmp_path}/log"\n[data.columns]\ntimestamp = "timestamp"\n[data.split]\nvalid = "4d"\ntest = "2d"\n'
    )
    found = check(str(config))
    split = next(one for one in found.findings if one.name == "split").values
    end = frame.timestamp.max() + 1e-6
    test = frame[frame.timestamp >= end - 2 * DAY]
    train = frame[frame.timestamp < end - 6 * DAY]
    assert (split["train"], split["test"]) == (len(train), len(test))
    assert split["cold_items"] == pytest.approx(1 - test.item_id.isin(train.item_id).mean())
    late = check(str(config), overrides=['data.split.test="50d"'])
    assert "empty_split" in _names(late)


def test_a_sample_of_a_large_log_says_so(tmp_path: Path) -> None:
    _write(tmp_path / "log", _split(_healthy()))
    found = check(str(tmp_path / "log"), ROLES, rows=9_000)
    assert int(found.facts["looked at"].split()[0].replace(",", "")) <= 9_000
    assert found.problems == []


def test_hourly_files_of_a_public_log() -> None:
    if not GLOBO.exists():
        pytest.skip(f"the public log {GLOBO} is not there")
    found = check(str(GLOBO))
    by_name = {one.name: one for one in found.problems}
    assert set(by_name) == {"small_files", "stragglers", "gaps", "cold_targets"}
    assert by_name["gaps"].values["first"] == "2017-10-05T06:00:00Z"
    frame = pd.concat([pd.read_parquet(path) for path in sorted(GLOBO.glob("*.parquet"))])
    assert found.facts["users"].startswith(f"{frame.user_id.nunique():,};")
    assert found.facts["items"].startswith(f"{frame.click_article_id.nunique():,};")
