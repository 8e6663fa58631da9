"""Progress: bars that move on a terminal, at most one line every 30 s elsewhere, nothing where messages are not shown."""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from recray import log, progress

BAR = """
import time
from recray import log, progress
log.configure("rich")
with progress.task("prepare", "5,000,000 events"):
    with progress.task("prepare", "write shards", 40) as task:
        task.update(12, note="figures")
        time.sleep(1.5)
log.info("prepare", "done")
"""


class _Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    fake = _Clock()
    monkeypatch.setattr(progress, "_clock", fake)
    monkeypatch.setattr(progress, "_tick", lambda ended: None)  # lines at times of the fake clock only
    monkeypatch.setattr(progress, "_quiet_until", 0.0)
    return fake


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    logger = logging.getLogger("recray")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before
    assert progress._tasks == []


def test_a_log_file_gets_one_line_every_30_seconds_over_all_tasks(clock: _Clock) -> None:
    stream = io.StringIO()
    log.configure("plain", stream=stream)
    with progress.task("prepare", "all"):
        for _ in range(10):
            for _ in progress.track(range(100), "prepare", "shards"):
                clock.now += 0.25  # 250 seconds in all
    lines = stream.getvalue().splitlines()
    assert len(lines) == 8
    assert lines[0] == "prepare: shards 20/100  4/s  20 s left"


def test_lines_and_events_tell_figures(clock: _Clock) -> None:
    stream = io.StringIO()
    log.configure("json", stream=stream)
    task = progress.Task("train", "epoch 2/5", 400, done=100).start()
    clock.now += 40
    task.update(20, note="loss 0.4310")
    clock.now += 1
    task.update(1, note="loss 0.4305")
    task.stop()
    assert task.line() == "epoch 2/5 121/400  0.5122/s  loss 0.4305  545 s left"
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(one["stage"], one["event"]) for one in events] == [("train", "progress")]
    assert events[0]["values"] == {"title": "epoch 2/5", "done": 120, "total": 400, "seconds": 40.0, "left": 560.0}


def test_work_without_steps_still_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.05)
    monkeypatch.setattr(progress, "_quiet_until", 0.0)
    stream = io.StringIO()
    log.configure("plain", stream=stream)
    with progress.task("index", "build IVF"):
        end = time.monotonic() + 5
        while not stream.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
    assert stream.getvalue().startswith("index: build IVF ")


def test_silent_where_messages_are_not_shown(clock: _Clock, capfd: pytest.CaptureFixture[str]) -> None:
    log.configure("plain", logging.WARNING)
    for _ in progress.track(range(100), "evaluate", "shards"):
        clock.now += 10
    assert list(progress.track(range(3), "train", "validate", enabled=False)) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


def test_tasks_of_a_block_that_fails_end(clock: _Clock) -> None:
    log.configure("plain", stream=io.StringIO())
    with pytest.raises(RuntimeError), progress.scope():
        progress.Task("train", "epoch 1/5", 10).start()
        raise RuntimeError
    assert progress._tasks == []


def test_a_terminal_shows_bars_that_move_without_steps() -> None:
    main, terminal = pty.openpty()
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), TERM="xterm", COLUMNS="120")
    child = subprocess.Popen([sys.executable, "-c", BAR], stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    at, seen = [], b""
    while select.select([main], [], [], 30)[0]:
        try:
            part = os.read(main, 65_536)
        except OSError:  # the child has closed it
            break
        if not part:
            break
        seen += part
        at.append(time.monotonic())
    assert child.wait(30) == 0
    os.close(main)
    text = seen.decode()
    shown = ("prepare: 5,000,000 events", "prepare: write shards", "12/40", "left", "figures", "prepare: done")
    assert [one for one in shown if one not in text] == []
    assert len(at) > 5 and max(b - a for a, b in itertools.pairwise(at)) < 5
    assert text.rstrip().endswith("prepare: done")  # bars leave no line behind


def test_a_log_of_a_command_has_no_bars(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BAR.replace('"rich"', '"plain"')],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == "prepare: done\n"
