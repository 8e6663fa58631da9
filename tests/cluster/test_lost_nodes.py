"""Nodes that are lost and come back while a model trains: the same command trains on, and finds as good a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tomli_w
from nodes import Nodes

from helpers.faults import config_of
from helpers.inline_tasks import inline_prepare
from recray.config import Config
from recray.records import CheckpointRecord

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KILLS = int(os.environ.get("RECRAY_NODE_KILLS", "3"))


@contextmanager
def _training(config: Config, nodes: Nodes, folder: Path) -> Iterator[Iterator[dict[str, object]]]:
    """`recray train` on the cluster; yields its messages."""
    file = folder / f"{config.run.name}.toml"
    file.write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True, exclude_unset=True)))
    command = [sys.executable, "-m", "recray", "--json", "train", str(file)]
    env = nodes.env | {"RAY_ADDRESS": f"127.0.0.1:{nodes.port}"}
    said: list[str] = []

    def messages(lines: Iterable[str]) -> Iterator[dict[str, object]]:
        for line in lines:
            said.append(line)
            if '{"' in line:  # Ray puts a worker's name before what it says
                yield json.loads(line[line.index('{"') : line.rindex("}") + 1])

    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        assert child.stdout is not None
        try:
            yield messages(child.stdout)
            code = child.wait(60)
        finally:
            child.kill()
    assert code == 0, "".join(said[-40:])


def _two_nodes(nodes: Nodes) -> None:
    nodes.head("--num-cpus=0", "--dashboard-host=127.0.0.1", f"--dashboard-port={nodes.dashboard_port}")
    nodes.wait_for(nodes.dashboard_port)
    for _ in range(2):
        nodes.worker("--num-cpus=1")
    nodes.wait_for_nodes(3)


def test_nodes_that_are_lost_and_replaced(nodes: Nodes, tmp_path: Path) -> None:
    _two_nodes(nodes)
    every = 12  # epochs between two losses; what a worker says comes a second or two late
    options = (f"training.epochs={every * (KILLS + 1)}", "training.save_every=5 steps", "scaling.wait_seconds=300")
    undisturbed, lost = (config_of(tmp_path, name, *options) for name in ("undisturbed", "lost"))
    inline_prepare(undisturbed)
    with _training(undisturbed, nodes, tmp_path) as messages:
        assert [message["event"] for message in messages][-1] == "result"
    # A line may come from each node of this machine, since their folders of logs are the same.
    killed, epochs, events = 0, set[float](), []
    with _training(lost, nodes, tmp_path) as messages:
        for message in messages:
            events.append(message.get("event"))
            if message.get("event") != "epoch":
                continue
            epochs.add(message["values"]["epoch"])
            if killed < KILLS and len(epochs) >= every * (killed + 1):
                nodes.kill(1 + killed)  # the oldest that is left
                nodes.worker("--num-cpus=1")
                killed += 1
    assert killed == KILLS and events.count("restart") >= KILLS
    one, other = (CheckpointRecord.read(f"{config.run_uri}/checkpoint/current") for config in (undisturbed, lost))
    # What a node said last may be lost with it; the history is not.
    assert [entry["epoch"] for entry in other.history] == list(range(1, every * (KILLS + 1) + 1))
    assert one.value == other.value and one.best_epoch == other.best_epoch  # two workers all the time: bit for bit


def test_fewer_workers_train_on_and_more_join(nodes: Nodes, tmp_path: Path) -> None:
    _two_nodes(nodes)
    options = ("training.epochs=120", "scaling.min_workers=1", "scaling.wait_seconds=30")
    config = config_of(tmp_path, "elastic", *options)
    inline_prepare(config)
    events: list[object] = []
    with _training(config, nodes, tmp_path) as messages:
        for message in messages:
            events.append(message.get("event"))
            if events.count("epoch") == 2 and message["event"] == "epoch":
                nodes.kill(1)  # once: "epoch" is counted
            if events[-1] == "epoch" and "fewer_workers" in events and "node" not in events:
                events.append("node")
                nodes.worker("--num-cpus=1")
    story = [event for event in events if event in ("restart", "fewer_workers", "node", "resize", "result")]
    assert story[0] == "restart" and [event for event in story if event != "restart"] == [
        "fewer_workers",
        "node",
        "resize",
        "result",
    ], story
    assert CheckpointRecord.read(f"{config.run_uri}/checkpoint/current").epoch <= 120
