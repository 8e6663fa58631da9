"""`recray replay`: a log walked forward day by day."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from helpers.growing_log import START, growing_config, write_day
from helpers.inline_tasks import inline_prepare
from recray.config import with_values
from recray.errors import ConfigError
from recray.evaluation import replay

BEGIN = datetime.fromtimestamp(START / 1e6, UTC) + timedelta(days=2)


def test_a_replay_asks_all_systems_the_same_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for day in range(4):
        write_day(tmp_path / "clicks", day)
    config = growing_config(
        tmp_path,
        "retrieval.recency.enabled=true",
        "retrieval.recency.popularity_window=2h",
        "data.split.valid=1d",
        "training.epochs=1",
    )
    monkeypatch.setattr(replay, "prepare", inline_prepare)
    found = replay.replay(config, "1d", BEGIN, BEGIN + timedelta(days=2))
    systems = ["frozen", "continued", "retrained", "rolling_popularity", "transitions"]
    assert [list(one.metrics) for one in found.steps] == [systems] * 2
    first, second = found.steps
    # The first model is all three; its retrained successor is another one.
    assert first.metrics["frozen"] == first.metrics["continued"] == first.metrics["retrained"]
    assert second.metrics["frozen"] != second.metrics["retrained"]
    assert second.seconds["frozen"] == 0 < second.seconds["continued"]
    assert first.queries > 1_000 and second.queries > 1_000
    written = json.loads(Path(found.uri, "replay.json").read_text())
    assert written == json.loads(json.dumps(found.as_json()))
    mean = sum(one.queries * one.metrics["frozen"]["hr@10"] for one in found.steps) / (first.queries + second.queries)
    assert found.means()["frozen"]["hr@10"] == pytest.approx(mean)
    text = replay.render(found)
    assert "recent transitions" in text and second.start in text and f"{mean:.4f}" in text
    assert second.start in Path(found.uri, "replay.html").read_text()

    def no_work(*_: object) -> None:
        raise AssertionError("a complete step is done again")

    monkeypatch.setattr(replay, "_replay_step", no_work)
    assert replay.replay(config, "1d", BEGIN, BEGIN + timedelta(days=2)).steps == found.steps


def test_what_cannot_be_replayed_is_refused(tmp_path: Path) -> None:
    config = growing_config(tmp_path)
    for changed, end, message in (
        (config, BEGIN + timedelta(hours=5), "there is no step of 1d: choose a shorter one"),
        (
            with_values(config, {"data.split.kind": "leave_last"}),
            BEGIN + timedelta(days=2),
            "kind = 'temporal', not 'le",
        ),
        (with_values(config, {"training.start_from": "previous"}), BEGIN + timedelta(days=2), "leave it unset"),
    ):
        with pytest.raises(ConfigError, match=message):
            replay.replay(changed, "1d", BEGIN, end)
