"""No file and no line of JSON holds NaN or Infinity, which other readers refuse."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from recray import log, storage, strict_json
from recray.records import Interval, ReportRecord
from recray.report.text import render


def _strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in {text}")

    return json.loads(text, parse_constant=refuse)


def test_what_is_not_finite_is_null_wherever_it_stands() -> None:
    value = {"a": math.nan, "b": [1.5, math.inf, {"c": (-math.inf, 2)}], "d": "NaN", "e": None, "f": True}
    found = _strict(strict_json.dumps(value))
    assert found == {"a": None, "b": [1.5, None, {"c": [None, 2]}], "d": "NaN", "e": None, "f": True}
    assert value["a"] is math.nan


def _report() -> ReportRecord:
    names = ("auc", "gauc", "gauc_impressions", "log_loss", "normalized_entropy", "ece")
    values = {name: Interval(value=math.nan if name != "log_loss" else 0.25) for name in names}
    counts = {"impressions": 4, "clicks": 4, "users": 2, "unknown_items": 0, "without_history": 0}
    return ReportRecord(kind="clicks", split="test", metrics={"model": values}, counts=counts)


def test_an_undefined_metric_is_null_in_the_record_and_a_word_in_the_text(tmp_path: Path) -> None:
    _report().write(str(tmp_path))
    body = _strict((tmp_path / "report.json").read_text())
    assert body["metrics"]["model"]["auc"]["value"] is None
    assert body["metrics"]["model"]["log_loss"]["value"] == 0.25
    again = ReportRecord.read(str(tmp_path))
    assert math.isnan(again.metrics["model"]["auc"].value)
    assert _strict(again.model_dump_json())["metrics"]["model"]["gauc"]["value"] is None  # as --report - prints it
    assert "undefined" in render(again) and "nan" not in render(again)


def test_a_json_line_is_strict(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("recray")
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        log.configure("json")
        log.info("train", "loss nan", event="epoch", values={"loss": math.nan, "where": Path("/a")})
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
    assert _strict(capsys.readouterr().out)["values"] == {"loss": None, "where": "/a"}


def test_files_are_strict(tmp_path: Path) -> None:
    storage.write_json(str(tmp_path / "a.json"), {"x": math.inf})
    assert _strict((tmp_path / "a.json").read_text()) == {"x": None}
