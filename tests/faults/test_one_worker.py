"""Faults of a training in one process: `recray train` in a child, and the weights of an undisturbed one in the end."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.faults import Table, config_of, forked_child, half_written, recray_child, same_weights, wait_for
from helpers.inline_tasks import inline_prepare
from helpers.runs import selection
from recray.config import Config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ONE = ("scaling.num_workers=1", "training.epochs=12")
EPOCH = '"event": "epoch"'


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An undisturbed training."""
    config = config_of(tmp_path_factory.mktemp("faults"), "undisturbed", *ONE)
    inline_prepare(config)
    with forked_child(config, "train") as child:
        assert child.end()[0] == 0
    return config


def _like(whole: Config, name: str, *overrides: str) -> Config:
    return config_of(Path(whole.run.output), name, *ONE, *overrides)


def _finish(whole: Config, config: Config) -> float:
    """Give the same command again; seconds until its first epoch."""
    with forked_child(config, "train") as child:
        child.until(EPOCH)
        seconds = time.monotonic() - child.began
        code, said = child.end()
        assert code == 0, said
    assert same_weights(whole, config) and not half_written(config.run_uri)
    return seconds


def test_kill_9_of_the_process_at_random_moments(whole: Config, table: Table) -> None:
    config, draw, killed, seconds = _like(whole, "killed"), random.Random(3), 0, [0.0]
    for _ in range(4):
        with forked_child(config, "train") as child:
            child.until(EPOCH)
            seconds.append(time.monotonic() - child.began)
            time.sleep(draw.random() / 3)
            child.process.kill()
            killed += child.process.wait() == -signal.SIGKILL
            child.gone(5)
    assert killed >= 2
    _finish(whole, config)
    table.row("kill -9, one worker, random moments", "steps since the last save", max(seconds))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal(whole: Config, table: Table, number: signal.Signals, code: int) -> None:
    config = _like(whole, number.name.lower())
    with recray_child(config, "train") as child:
        child.until(EPOCH)
        child.process.send_signal(number)
        sent = time.monotonic()
        assert child.end(20)[0] == code
        stopped = time.monotonic() - sent
        found = re.search(r"asked to stop: (step \d+ of )?epoch \d+ is saved; the same command resumes", child.said())
        assert found, child.said()
        child.gone(5)
    assert not half_written(config.run_uri)
    _finish(whole, config)
    table.row(f"{number.name}, one worker", "nothing", stopped)


def test_ctrl_c_twice_ends_at_once(whole: Config, table: Table) -> None:
    config = _like(whole, "twice")
    with recray_child(config, "train") as child:
        child.until(EPOCH)
        child.process.send_signal(signal.SIGINT)
        time.sleep(0.01)
        child.process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        assert child.end(10)[0] == 130
        stopped = time.monotonic() - sent
        child.gone(5)
    assert stopped < 10 and not half_written(config.run_uri)
    _finish(whole, config)
    table.row("Ctrl-C twice", "steps since the last save", stopped)


def test_a_process_that_is_stopped_for_a_while(whole: Config, table: Table) -> None:
    config = _like(whole, "stopped")
    with forked_child(config, "train") as child:
        child.until(EPOCH)
        child.process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        child.process.send_signal(signal.SIGCONT)
        assert child.end()[0] == 0
    assert same_weights(whole, config)
    table.row("SIGSTOP and SIGCONT, one worker", "nothing", 0)


def test_two_trainings_of_one_run(whole: Config, table: Table) -> None:
    config = _like(whole, "both", "training.epochs=400")
    with forked_child(config, "train") as first:
        first.until(EPOCH)
        with forked_child(config, "train") as second:
            code, said = second.end()
        assert code == 2 and f"is being written by process {first.process.pid} on " in said, said
        assert first.process.poll() is None
        first.process.send_signal(signal.SIGTERM)
        assert first.end()[0] == 143
    assert not half_written(config.run_uri)
    table.row("a second training of the same run", "nothing: refused by name", 0)


@pytest.mark.parametrize("damage", ["a bit flipped", "cut off", "a file removed", "the record removed"])
def test_the_newest_state_is_damaged(whole: Config, table: Table, damage: str) -> None:
    config = _like(whole, damage.replace(" ", "-"))
    with forked_child(config, "train") as child:
        child.until(EPOCH, 3)
        child.process.kill()
        child.process.wait()
    phase = selection(config)
    newest, before = phase.saved()[:2]
    file = Path(phase.folder(*newest), "checkpoint.json" if "record" in damage else "state.pt")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    if "removed" in damage:
        file.unlink()
    else:
        file.write_bytes(data[:-9] if damage == "cut off" else data)
    with forked_child(config, "train") as child:
        code, said = child.end()
    assert code == 0 and f"resuming after {before}" in said, said
    assert "record" in damage or ("cannot be used" in said and "state.pt" in said)
    assert same_weights(whole, config)
    table.row(f"the newest saved state: {damage}", "steps since the state before it", 0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _on(folder: Path, whole: Config) -> Config:
    return config_of(folder, "full", *ONE, f"run.dataset={whole.run.dataset}")


def test_a_disk_that_runs_full(whole: Config, small_disk: Path, table: Table) -> None:
    config = _on(small_disk, whole)
    with forked_child(config, "train") as child:
        child.until(EPOCH)
        ballast = small_disk / "ballast"
        with ballast.open("wb", buffering=0) as stream:
            try:
                while True:
                    stream.write(b"x" * 4096)
            except OSError:
                pass
        code, said = child.end(60)
    assert code == 2 and "StorageError: disk full: " in said and "Traceback" not in said, said
    assert not [path for path in half_written(small_disk) if path.suffix == ".part"]
    ballast.unlink()
    assert len(selection(config).saved()) >= 1
    seconds = _finish(whole, config)
    table.row("full disk while saving", "steps since the last save", seconds)


def test_an_output_that_becomes_read_only(whole: Config, small_disk: Path, table: Table) -> None:
    config = _on(small_disk, whole)
    with forked_child(config, "train") as child:
        child.until(EPOCH)
        read_only = ["mount", "-o", "remount,ro,size=400k", str(small_disk)]  # refused while a file is being written
        wait_for(lambda: not subprocess.run(read_only, capture_output=True).returncode, 30, lambda: "in use")
        code, said = child.end(60)
    assert code == 2 and "Read-only file system" in said and "Traceback" not in said, said
    subprocess.run(["mount", "-o", "remount,rw,size=400k", str(small_disk)], check=True)
    table.row("an output that becomes read-only", "steps since the last save", _finish(whole, config))
