"""Faults injected into training on two Ray workers: it recovers by itself, or the same command resumes it."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from helpers.faults import Child, Table, config_of, half_written, recray_child, same_weights
from helpers.inline_tasks import inline_prepare
from recray import storage
from recray.config import Config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EPOCH, RESTART = '"event": "epoch"', '"event": "restart"'
WAIT = 240.0  # seconds for Ray to start its processes on a busy machine


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An undisturbed training."""
    config = config_of(tmp_path_factory.mktemp("faults"), "undisturbed")
    inline_prepare(config)
    with recray_child(config, "train") as child:
        code, said = child.end(WAIT)
        assert code == 0, said
        child.gone(30)
    return config


def _workers(child: Child) -> list[int]:
    return sorted(child.processes("ray::RayTrainWorker"))


def _finish(whole: Config, config: Config) -> None:
    with recray_child(config, "train") as child:
        code, said = child.end(WAIT)
        assert code == 0, said
    assert same_weights(whole, config) and not half_written(config.run_uri)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_is_stopped_is_named_and_replaced(whole: Config, table: Table, rank: int) -> None:
    """SIGSTOP: its connections stay open, so that only time tells."""
    config = config_of(Path(whole.run.output), f"stopped-{rank}", "scaling.collective_timeout=10")
    with recray_child(config, "train") as child:
        child.until(EPOCH, 2, WAIT)
        stopped = _workers(child)[rank]
        os.kill(stopped, signal.SIGSTOP)
        since = time.monotonic()
        said = child.until(RESTART, 1, 90)  # the limit, and the time to end what does not answer
        named = time.monotonic() - since
        message = next(line for line in said.splitlines() if RESTART in line)
        assert re.search(rf"workers were lost \(worker \d on \S+ did not answer \(process {stopped}\)\)", message), said
        epochs = said.count(EPOCH)
        child.until(EPOCH, epochs + 1, WAIT)
        recovered = time.monotonic() - since
        assert stopped not in _workers(child)
        code, said = child.end(WAIT)
        assert code == 0, said
        child.gone(30)
    assert same_weights(whole, config) and not half_written(config.run_uri)
    table.row(f"SIGSTOP of one of two workers, named after {named:.0f} s", "steps since the last save", recovered)


def test_a_worker_that_dies_again_and_again_is_named(whole: Config, table: Table) -> None:
    config = config_of(Path(whole.run.output), "dies", "scaling.max_failures=0")
    with recray_child(config, "train") as child:
        child.until(EPOCH, 1, WAIT)
        killed = _workers(child)[1]
        os.kill(killed, signal.SIGKILL)
        since = time.monotonic()
        code, said = child.end(60)
        seconds = time.monotonic() - since
        child.gone(30)
    last = json.loads(said.strip().splitlines()[-1])
    assert code == 2 and last["event"] == "error" and "Traceback" not in said, said
    assert "training workers were lost 1 times without progress" in last["message"]
    assert not half_written(config.run_uri)
    _finish(whole, config)
    table.row("a worker that dies more than scaling.max_failures times", "steps since the last save", seconds)


def test_kill_9_of_the_driver_ends_its_workers(whole: Config, table: Table) -> None:
    config = config_of(Path(whole.run.output), "driver")
    with recray_child(config, "train") as child:
        child.until(EPOCH, 2, WAIT)
        child.process.kill()
        child.process.wait()
        since = time.monotonic()
        while _workers(child):
            time.sleep(0.1)
        seconds = time.monotonic() - since
        assert seconds < 10
        child.gone(30)
    assert not storage.exists(f"{config.run_uri}/checkpoint/current")
    _finish(whole, config)
    table.row("kill -9 of the driver of two workers: they are gone", "steps since the last save", seconds)


def test_ctrl_c_twice_ends_the_workers(whole: Config, table: Table) -> None:
    config = config_of(Path(whole.run.output), "twice")
    with recray_child(config, "train") as child:
        child.until(EPOCH, 1, WAIT)
        child.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        child.process.send_signal(signal.SIGINT)
        since = time.monotonic()
        code, said = child.end(30)
        assert code == 130 and "Traceback" not in said, said
        child.gone(30)
        seconds = time.monotonic() - since
    assert not half_written(config.run_uri)
    _finish(whole, config)
    table.row("Ctrl-C twice, two workers", "steps since the last save", seconds)
