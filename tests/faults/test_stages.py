"""SIGTERM, Ctrl-C and kill -9 in prepare, index, evaluate and recommend: nothing half written, no process, the same result."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path

import pytest

from helpers.faults import Table, config_of, forked_child, half_written, recray_child
from helpers.inline_tasks import inline_prepare
from recray import storage
from recray.config import Config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ONE = ("scaling.num_workers=0", "training.epochs=2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = config_of(tmp_path_factory.mktemp("faults"), "trained", *ONE)
    inline_prepare(config)
    for words in (("train",), ("index",), ("evaluate",), ("recommend", "--output", f"{config.run.output}/whole")):
        with forked_child(config, *words) as child:
            code, said = child.end()
            assert code == 0, said
    return config


def _tables(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*.parquet")
    }


def _slow_records() -> None:
    """A child waits before it completes an artefact, so that a signal comes before."""
    write = storage.write_bytes

    def slow(uri: str, data: bytes) -> None:
        if uri.endswith(("index.json", "report.json", "_lists.json")):
            os.write(2, b"WRITING\n")
            time.sleep(60)
        write(uri, data)

    storage.write_bytes = slow


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize("stage", ["index", "evaluate", "recommend"])
def test_a_stage_that_is_ended(trained: Config, table: Table, stage: str, number: signal.Signals) -> None:
    output = Path(trained.run.output)
    # Another value for each signal: an artefact that is there already would be up to date.
    key = {"index": "retrieval.k", "evaluate": "evaluation.bootstrap"}.get(stage)
    config = config_of(output, "trained", *ONE, *([f"{key}={20 + number}"] if key else []))
    words = (stage, "--output", f"{output}/{number.name}") if stage == "recommend" else (stage,)
    with forked_child(config, *words, before=_slow_records) as child:
        child.until("WRITING")
        child.process.send_signal(number)
        sent = time.monotonic()
        code, said = child.end(20)
        seconds = time.monotonic() - sent
        assert code == (-number if number == signal.SIGKILL else 128 + number) and "Traceback" not in said, said
        child.gone(5)
    assert number == signal.SIGKILL or not half_written(output)
    with forked_child(config, *words) as child:
        code, said = child.end()
        assert code == 0, said
    assert not half_written(output)
    if stage == "recommend":
        assert _tables(output / number.name) == _tables(output / "whole")
    table.row(f"{number.name} in {stage}", "the stage's work", seconds)


LOG = ("data.simulated.events=40000", "data.shard_events=2000")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of an undisturbed prepare."""
    folder = tmp_path_factory.mktemp("whole")
    _prepare(config_of(folder, "prepared", *LOG))
    return _tables(folder / "dataset")


def _prepare(config: Config) -> None:
    with recray_child(config, "prepare") as child:
        code, said = child.end(400)
        assert code == 0, said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_prepare_that_is_ended(prepared: dict[str, str], tmp_path: Path, table: Table, number: signal.Signals) -> None:
    config = config_of(tmp_path, "prepared", *LOG)
    with recray_child(config, "prepare") as child:
        child.until("events read", 1, 400)
        child.process.send_signal(number)
        sent = time.monotonic()
        code, said = child.end(30)
        assert code == (-number if number == signal.SIGKILL else 128 + number) and "Traceback" not in said, said
        child.gone(30)
        seconds = time.monotonic() - sent
    files = [path for path in (tmp_path / "dataset").rglob("*") if path.is_file()]
    assert number == signal.SIGKILL or not files
    _prepare(config)
    assert not half_written(tmp_path)
    assert _tables(tmp_path / "dataset") == prepared
    table.row(f"{number.name} in prepare: no process left", "the stage's work", seconds)
