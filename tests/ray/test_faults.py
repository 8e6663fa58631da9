"""Faults injected into training on Ray workers: the result is that of an undisturbed training, without a new start by hand."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tomli_w
import torch
from safetensors.torch import load_file

import recray
from helpers.faults import config_of
from helpers.runs import selection
from recray import storage
from recray.cluster.errors import lost_worker, summary
from recray.config import Config
from recray.errors import RecrayError

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def prepared(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = config_of(tmp_path_factory.mktemp("faults"), "undisturbed")
    recray.prepare(config)
    return config


@contextmanager
def _training(config: Config, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """`recray train` in another process, whose messages are lines of JSON on its standard output."""
    file = folder / "train.toml"
    file.write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True, exclude_unset=True)))
    command = [sys.executable, "-m", "recray", "--json", "train", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def _workers_of(pid: int) -> list[int]:
    """Processes of training workers below a driver."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
    below, found = {pid}, []
    for _ in range(4):  # driver, raylet, worker
        below |= {int(child) for child, parent, _ in rows if int(parent) in below}
    found += [int(child) for child, _, args in rows if int(child) in below and args.startswith("ray::RayTrainWorker")]
    return sorted(found)


def _epochs(child: subprocess.Popen[str], count: int) -> None:
    """Read its messages until `count` epochs are done."""
    assert child.stdout is not None
    for line in child.stdout:
        count -= '"event": "epoch"' in line
        if count <= 0:
            return
    raise AssertionError(f"training ended with {child.wait()}")


def _same_weights(a: Config, b: Config) -> bool:
    one, other = (load_file(f"{c.run_uri}/checkpoint/current/model.safetensors") for c in (a, b))
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_only_lost_workers_are_started_again() -> None:
    from ray.exceptions import ActorDiedError
    from ray.train import WorkerGroupError

    def group(*failures: Exception) -> WorkerGroupError:
        return WorkerGroupError("failed", dict(enumerate(failures)))

    gone = RuntimeError("[enforce fail at pair.cc] Connection closed by peer [127.0.0.1]:1234")
    assert lost_worker(group(gone, ActorDiedError())) and lost_worker(group(gone))
    assert not lost_worker(group(TypeError("unsupported operand"))) and not lost_worker(
        group(RecrayError("loss"), gone)
    )
    assert summary(group(ValueError("first line\nlast line"))) == "last line"
    # Texts of Ray 2.60.
    silent = RuntimeError(
        "A worker health check has been hanging for 8.54 seconds. Marking the worker as dead.\nWorker info: Worker(\n"
        "  metadata=ActorMetadata(\n    hostname='node-7',\n    node_ip='192.0.2.2',\n    pid=388,\n  ),\n)\nSet the"
    )
    died = RuntimeError("The actor died unexpectedly before finishing this task.\n\tpid: 77\n\tip: 192.0.2.3\n")
    assert lost_worker(group(gone, silent)) and summary(group(gone, silent)) == (
        "worker 1 on node-7 did not answer (process 388)"
    )
    assert summary(group(died, gone)) == "worker 0 on 192.0.2.3 ended (process 77)"


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_a_stopped_driver_resumes(prepared: Config, tmp_path: Path) -> None:
    """kill -9 on one of two workers, later SIGTERM to the driver: the weights are those of an undisturbed training."""
    recray.train(prepared)
    config = config_of(Path(prepared.run.output), "disturbed")
    with _training(config, tmp_path) as child:
        _epochs(child, 1)
        os.kill(_workers_of(child.pid)[-1], signal.SIGKILL)
        assert child.stdout is not None
        restarted = next(line for line in child.stdout if '"event": "restart"' in line)
        assert json.loads(restarted)["values"]["failures"] == 1
        _epochs(child, 1)
        child.send_signal(signal.SIGTERM)
        rest = child.stdout.read()
        assert child.wait() == 143, rest
        assert re.search(r"training was asked to stop: .*epoch \d+ is saved; the same command resumes there", rest)
    assert not storage.exists(f"{config.run_uri}/checkpoint/current")
    assert selection(config).last_epoch() != config.training.epochs
    recray.train(config)
    assert _same_weights(prepared, config)
