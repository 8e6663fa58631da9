"""A process that is killed (kill -9) at any change of any file, in every stage; the same commands then end as if nothing were.

The stages run in a child process whose file operations are counted: every move of a finished file to its name, and every
deletion of a folder. The child is killed before one of them, after one of them, or while the file is half written.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import recray
from helpers.configs import simulated_table
from helpers.faults import Table, forking, half_written
from helpers.inline_tasks import inline_prepare
from recray import folders
from recray.config import Config, parse_config
from recray.records import ReportRecord

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MOMENTS = 20


def _config(folder: Path) -> Config:
    table = simulated_table(
        folder,
        events=1500,
        users=60,
        items=50,
        model={"name": "two_tower", "dim": 4, "hidden": [8], "dropout": 0.2},
        training={"epochs": 3, "global_batch_size": 64, "save_every": "3 steps", "refit": True},
        evaluation={"bootstrap": 10, "baselines": ["popularity"]},
        retrieval={"sweep_users": 20},
    )
    table["data"]["shard_events"] = 500
    return parse_config(table | {"scaling": {"num_workers": 0}})


def _stages(folder: Path) -> None:
    config = _config(folder)
    inline_prepare(config)
    recray.train(config)
    recray.index(config)
    recray.evaluate(config)
    recray.recommend(config, str(folder / "lists"), k=5)


def _killed_at(folder: Path, number: int, how: str) -> None:
    """Run the stages, and die at the change of this number."""
    counted = _counting(lambda at, path: _die(path, how) if at == number and how != "after" else None)
    after = lambda at: os.kill(os.getpid(), signal.SIGKILL) if at == number and how == "after" else None  # noqa: E731
    _patch(counted, after)
    _stages(folder)


def _die(path: str, how: str) -> None:
    if how == "half" and os.path.isfile(path):
        os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def _counting(before: Callable[[int, str], None]) -> Callable[[str], int]:
    count = 0

    def change(path: str) -> int:
        nonlocal count
        count += 1
        before(count, path)
        return count

    return change


def _patch(change: Callable[[str], int], after: Callable[[int], None]) -> None:
    replace, delete = os.replace, folders.delete_written

    def counted_replace(source: Any, target: Any, **options: Any) -> None:
        number = change(str(source))
        replace(source, target, **options)
        after(number)

    def counted_delete(folder: str, written: re.Pattern[str]) -> list[str]:
        number = change(folder)
        left = delete(folder, written)
        after(number)
        return left

    os.replace = counted_replace
    folders.delete_written = counted_delete


def _count(folder: Path, queue: Any) -> None:
    last = [0]
    _patch(_counting(lambda at, path: last.__setitem__(0, at)), lambda at: None)
    _stages(folder)
    queue.put(last[0])


def _spawn(work: Callable[..., None], *args: Any) -> int | None:
    process = forking().Process(target=work, args=args)
    process.start()
    process.join(120)
    return process.exitcode


def _results(folder: Path) -> dict[str, Any]:
    """What the stages made, without times."""
    config = _config(folder)
    found: dict[str, Any] = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in ("*.parquet", "checkpoint/*/model.safetensors", "*.faiss")
        for path in folder.rglob(pattern)
        if "epochs" not in path.parts and "refit" not in path.parts
    }
    report = ReportRecord.read(f"{config.run_uri}/report/current")
    return found | {"metrics": report.metrics}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], int]]:
    """What an undisturbed run makes, and its number of changes."""
    folder = tmp_path_factory.mktemp("whole")
    queue = forking().SimpleQueue()
    assert _spawn(_count, folder, queue) == 0
    yield _results(folder), queue.get()


def test_a_kill_at_any_change_of_a_file(undisturbed: tuple[dict[str, Any], int], tmp_path: Path, table: Table) -> None:
    wanted, changes = undisturbed
    assert len(wanted) > 10 and changes > 50
    draw = random.Random(7)
    seconds = []
    for at in sorted(draw.sample(range(1, changes + 1), MOMENTS)):
        how, folder = draw.choice(("before", "half", "after")), tmp_path / str(at)
        folder.mkdir()
        assert _spawn(_killed_at, folder, at, how) == -signal.SIGKILL, at
        started = time.monotonic()
        assert _spawn(_stages, folder) == 0, (at, how)
        seconds.append(time.monotonic() - started)
        assert _results(folder) == wanted, (at, how)
        assert not half_written(folder), (at, how)
        shutil.rmtree(folder)
    table.row(f"kill -9 at {MOMENTS} of all changes of files, in every stage", "what was not saved", max(seconds))
