"""`ray up cluster/local.yaml` on three machines that are containers of the image with an SSH server, a job, `ray down`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from conftest import BUILD_OPTIONS, IMAGE, engine

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SSHD = "recray-test:sshd"


@dataclass(frozen=True)
class Machines:
    """Three machines; the first is the head. `home` is the home folder of the user who starts the cluster from here."""

    names: list[str]
    addresses: list[str]
    home: Path

    def environment(self) -> dict[str, str]:
        return os.environ | {"HOME": str(self.home), "RAY_AUTH_MODE": "token"}

    def autoscaler_log(self) -> str:
        return engine(
            "exec", self.names[0], "sh", "-c", "tail -n 40 /tmp/ray/session_latest/logs/monitor.log", check=False
        )

    def ray_processes(self) -> list[str]:
        tops = [engine("top", name, "args") for name in self.names]
        return [line for top in tops for line in top.splitlines() if "raylet" in line or "gcs_server" in line]


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    home, runs = tmp_path / "home", tmp_path / "runs"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    runs.mkdir()
    runs.chmod(0o777)
    key = home / ".ssh" / "id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    (tmp_path / "Dockerfile").write_text(
        f"FROM {IMAGE}\n"
        "RUN apt-get update && apt-get install --yes --no-install-recommends openssh-server"
        " && mkdir -p /run/sshd /home/recray/.ssh && ssh-keygen -A\n"
        "COPY home/.ssh/id_ed25519.pub /home/recray/.ssh/authorized_keys\n"
        "RUN chown -R recray /home/recray/.ssh && chmod 700 /home/recray/.ssh && usermod --password '*' recray\n"
        "WORKDIR /\n"
        'CMD ["/usr/sbin/sshd", "-D", "-e"]\n'
    )
    engine("build", *BUILD_OPTIONS, "-t", SSHD, str(tmp_path))
    names = [f"recray-test-{role}" for role in ("head", "worker-1", "worker-2")]
    for name in names:
        options = ("--init", "--shm-size=1g", "--memory=4g", "-v", f"{runs}:/runs")
        engine("run", "-d", "--rm", "--name", name, *options, SSHD)
    try:
        form = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        addresses = [engine("inspect", "-f", form, name).strip() for name in names]
        yield Machines(names, addresses, home)
    finally:
        engine("rm", "-f", *names, check=False)
        engine("rmi", SSHD, check=False)


def wait_for(what: str, done: Callable[[], bool], seconds: float) -> None:
    give_up = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < give_up, f"{what} not after {seconds} s"
        time.sleep(1)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_nodes_come_up_a_job_runs_and_ray_down_leaves_nothing(machines: Machines, tmp_path: Path) -> None:
    body = yaml.safe_load((REPOSITORY / "cluster" / "local.yaml").read_text())
    del body["docker"]  # the machines are the image
    head, *workers = machines.addresses
    body["provider"] |= {"head_ip": head, "worker_ips": workers}
    body["auth"] = {"ssh_user": "recray", "ssh_private_key": str(machines.home / ".ssh" / "id_ed25519")}
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(body))
    environment = machines.environment()

    def command(*words: str, seconds: float = 400) -> str:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, env=environment, cwd=tmp_path)
        assert done.returncode == 0, f"{words}\n{done.stdout[-6000:]}{done.stderr[-6000:]}"
        return done.stdout

    ray = str(BIN / "ray")
    command(ray, "get-auth-token", "--generate")
    command(ray, "up", "--yes", "--no-config-cache", str(file))
    port = free_port()
    tunnel = subprocess.Popen([ray, "dashboard", "--port", str(port), str(file)], env=environment, cwd=tmp_path)
    try:

        def alive() -> bool:
            found = command(
                ray, "exec", str(file), "RAY_AUTH_MODE=token ray list nodes --format json --filter state=ALIVE"
            )
            return found.count('"node_id"') == 3

        try:
            wait_for("three nodes", alive, 240)
        except AssertionError:
            raise AssertionError(machines.autoscaler_log()) from None
        environment["RAY_ADDRESS"] = f"http://127.0.0.1:{port}"
        out = command(
            str(BIN / "recray"), "submit", str(REPOSITORY / "jobs" / "configs" / "demo.toml"),
            "--set", "run.output=/runs", "--set", "data.simulated.events=20000", "--set", "training.epochs=1",
            "--set", "scaling.num_workers=2",
        )  # fmt: skip
        assert "ndcg@10" in out.lower()
    finally:
        tunnel.terminate()
        tunnel.wait(20)
    assert json.loads((tmp_path / "runs" / "demo" / "report" / "current" / "report.json").read_text())["metrics"][
        "model"
    ]
    command(ray, "down", "--yes", str(file))
    wait_for("no process of Ray", lambda: not machines.ray_processes(), 60)
