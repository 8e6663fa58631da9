"""Faults injected into training on two Ray workers: it recovers by itself, or the same command resumes it.

Ray takes longer to start than all of the training, so one run has all faults, one after the other.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from helpers.faults import Child, Table, config_of, half_written, recray_child, same_weights, wait_for
from helpers.inline_tasks import inline_prepare
from recray import storage
from recray.config import Config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

EPOCHS = "training.epochs=16"
EPOCH, RESTART = '"event": "epoch"', '"event": "restart"'
WAIT = 240.0  # seconds for Ray to start its processes on a busy machine


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An undisturbed training."""
    config = config_of(tmp_path_factory.mktemp("faults"), "undisturbed", EPOCHS)
    inline_prepare(config)
    with recray_child(config, "train") as child:
        code, said = child.end(WAIT)
        assert code == 0, said
        child.gone(30)
    return config


def test_a_run_that_everything_happens_to(whole: Config, table: Table) -> None:
    config = config_of(Path(whole.run.output), "disturbed", EPOCHS, "scaling.collective_timeout=10")
    with recray_child(config, "train") as child:
        child.until(EPOCH, 1, WAIT)
        for rank in (0, 1):
            _stop_a_worker(child, rank, table)
        _press_ctrl_c_twice(child, table)
    assert not half_written(config.run_uri)
    _worker_dies(config_of(Path(whole.run.output), "disturbed", EPOCHS, "scaling.max_failures=0"), table)
    _driver_dies(config, table)
    assert not storage.exists(f"{config.run_uri}/checkpoint/current")
    with recray_child(config, "train") as child:
        code, said = child.end(WAIT)
        assert code == 0 and '"event": "resume"' in said, said
        child.gone(30)
    assert same_weights(whole, config) and not half_written(config.run_uri)


def _workers(child: Child) -> list[int]:
    return sorted(child.processes("ray::RayTrainWorker"))


def _stop_a_worker(child: Child, rank: int, table: Table) -> None:
    """SIGSTOP: its connections stay open, so that only time tells. It is named and replaced."""
    stopped = _workers(child)[rank]
    os.kill(stopped, signal.SIGSTOP)
    since = time.monotonic()
    said = child.until(RESTART, rank + 1, 90)  # the limit, and the time to end what does not answer
    named = time.monotonic() - since
    message = [line for line in said.splitlines() if RESTART in line][-1]
    assert re.search(rf"workers were lost \(worker \d on \S+ did not answer \(process {stopped}\)\)", message), said
    child.until(EPOCH, said.count(EPOCH) + 1, WAIT)
    assert stopped not in _workers(child)
    recovered = time.monotonic() - since
    table.row(f"SIGSTOP of one of two workers, named after {named:.0f} s", "steps since the last save", recovered)


def _press_ctrl_c_twice(child: Child, table: Table) -> None:
    child.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    child.process.send_signal(signal.SIGINT)
    since = time.monotonic()
    code, said = child.end(30)
    assert code == 130 and "Traceback" not in said, said
    child.gone(30)
    table.row("Ctrl-C twice, two workers: all gone", "steps since the last save", time.monotonic() - since)


def _worker_dies(config: Config, table: Table) -> None:
    with recray_child(config, "train") as child:
        child.until(EPOCH, 1, WAIT)
        os.kill(_workers(child)[1], signal.SIGKILL)
        since = time.monotonic()
        code, said = child.end(60)
        seconds = time.monotonic() - since
        child.gone(30)
    last = json.loads(said.strip().splitlines()[-1])
    assert code == 2 and last["event"] == "error" and "Traceback" not in said, said
    assert "training workers were lost 1 times without progress" in last["message"]
    assert not half_written(config.run_uri)
    table.row("a worker that dies more than scaling.max_failures times", "steps since the last save", seconds)


def _driver_dies(config: Config, table: Table) -> None:
    with recray_child(config, "train") as child:
        child.until(EPOCH, 1, WAIT)
        child.process.kill()
        child.process.wait()
        since = time.monotonic()
        wait_for(lambda: not _workers(child), 10, lambda: "workers outlive their driver")
        seconds = time.monotonic() - since
        child.gone(30)
    table.row("kill -9 of the driver of two workers: they are gone", "steps since the last save", seconds)
