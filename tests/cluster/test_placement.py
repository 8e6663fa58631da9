"""Stages run next to the hardware that they ask for: index, evaluate and recommend on the node with a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
from nodes import Nodes

from helpers.faults import config_of
from helpers.inline_tasks import inline_prepare
from recray.training.launch import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

_IDS = "import ray; ray.init(logging_level='ERROR'); print(*[n['NodeID'] for n in ray.nodes() if n['Resources'].get('GPU')])"


def test_stages_go_to_the_gpu(nodes: Nodes, tmp_path: Path) -> None:
    nodes.head("--num-cpus=2", "--num-gpus=0")  # it has room, too
    nodes.worker("--num-cpus=2", "--num-gpus=1")  # Ray believes what it is told
    nodes.wait_for_nodes(2)
    env = nodes.env | {"RAY_ADDRESS": f"127.0.0.1:{nodes.port}"}
    (node,) = subprocess.run(
        [sys.executable, "-c", _IDS], env=env, text=True, capture_output=True, check=True
    ).stdout.split()
    config = config_of(tmp_path, "placed", "training.epochs=1", "scaling.num_workers=0")
    inline_prepare(config)
    train(config)
    config = config.model_copy(
        update={"scaling": config.scaling.model_copy(update={"num_workers": 1, "use_gpu": True})}
    )
    file = tmp_path / "placed.toml"
    file.write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True, exclude_unset=True)))
    for words in (("index",), ("evaluate",), ("recommend", "--output", f"{tmp_path}/lists")):
        command = [sys.executable, "-m", "recray", "--json", words[0], str(file), *words[1:]]
        done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = [
            json.loads(line[line.index('{"') :].rstrip("\x1b[0m")) for line in done.stdout.splitlines() if '{"' in line
        ]
        placed = [line["values"] for line in lines if line["event"] == "placed"]
        # A line comes once from each node of this machine, since their folders of logs are the same.
        assert {one["node"] for one in placed} == {node} and placed[0]["gpus"] == ["0"], lines
