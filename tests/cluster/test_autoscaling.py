"""Autoscaling without a cloud: with Ray's fake provider, nodes are processes on this machine (cluster/fake.yaml)."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from nodes import REPOSITORY, Nodes

_CODE = """
import sys, time
from recray import log
from recray.cluster import resources, runtime
from recray.config import ScalingConfig
log.configure("plain", stream=sys.stdout)
runtime.connect()
import ray
deadline = time.monotonic() + 60
while not resources.autoscales() and time.monotonic() < deadline:  # false until the autoscaler's first report
    time.sleep(0.2)
print("autoscales", resources.autoscales(), flush=True)
runtime.start(ScalingConfig(num_workers=2, cpus_per_worker=1, use_gpu=True))
resources.wait([{"CPU": 1.0, "trainer": 1.0}] * 2, 120)
count = lambda: sum("trainer" in node["Resources"] for node in ray.nodes() if node["Alive"])
print("trainers", count(), flush=True)
deadline = time.monotonic() + 60
while count() and time.monotonic() < deadline:
    time.sleep(0.5)
print("trainers", count(), flush=True)
resources.wait([{"GPU": 1.0}], 2)
"""


@pytest.mark.slow
def test_a_job_waits_for_nodes_which_are_removed_when_idle(nodes: Nodes, tmp_path: Path) -> None:
    config = yaml.safe_load((REPOSITORY / "cluster" / "fake.yaml").read_text())
    config["provider"] |= {"gcs_address": f"127.0.0.1:{nodes.port}"}
    (tmp_path / "fake.yaml").write_text(yaml.safe_dump(config))
    nodes.head(
        *("--num-cpus=1", "--include-dashboard=false", f"--autoscaling-config={tmp_path / 'fake.yaml'}"),
        RAY_FAKE_CLUSTER="1",
        AUTOSCALER_UPDATE_INTERVAL_S="1",
    )
    env = nodes.env | {"RAY_ADDRESS": f"127.0.0.1:{nodes.port}"}
    done = subprocess.run([sys.executable, "-c", _CODE], env=env, capture_output=True, text=True, timeout=280)
    lines = done.stdout.splitlines()
    assert lines[0] == "autoscales True", done.stdout + done.stderr
    assert "waiting for 1 CPU, 2 trainer: the autoscaler is adding nodes" in lines[1]
    assert "resources available after" in done.stdout
    assert [line for line in lines if line.startswith("trainers")] == ["trainers 2", "trainers 0"]
    assert "ResourceError: 1 GPU not available after" in done.stderr and "scaling.wait_seconds = 2" in done.stderr
