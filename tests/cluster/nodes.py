"""Ray clusters of several nodes, as child processes on loopback with token authentication, ended by their process ids."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[2]


class Cluster(NamedTuple):
    address: str  # of the GCS, for RAY_ADDRESS
    dashboard: str
    env: dict[str, str]  # with the token
    folder: Path  # the jobs' outputs


class Nodes:
    """`ray start --block` processes of one cluster, each in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.dashboard_port = free_port(), free_port()
        self.env = clean_env() | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "PYTHONPATH": str(REPOSITORY),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # a job's entry point is `python`
        }
        self._processes: list[subprocess.Popen[bytes]] = []

    def head(self, *options: str, **env: str) -> None:
        self._start("--head", f"--port={self.port}", f"--temp-dir={self.folder}/ray", *options, **env)
        self.wait_for(self.port)

    def worker(self, *options: str) -> None:
        """Returns when it runs. Of several nodes that start on one machine at once Ray finds only one."""
        self._start(f"--address=127.0.0.1:{self.port}", *options)
        file, process = self.folder / f"node-{len(self._processes) - 1}.log", self._processes[-1]
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in file.read_text(errors="replace"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(file.read_text(errors="replace"))
            time.sleep(0.1)

    def _start(self, *options: str, **env: str) -> None:
        ports = [
            f"--{name}-port={free_port()}"
            for name in (
                "node-manager",
                "object-manager",
                "dashboard-agent-listen",
                "runtime-env-agent",
                "metrics-export",
            )
        ]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address=127.0.0.1"]
        with open(self.folder / f"node-{len(self._processes)}.log", "wb") as log:
            self._processes.append(
                subprocess.Popen(
                    [*command, *ports, *options],
                    env=self.env | env,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_end_with_parent,
                )
            )

    def kill(self, number: int) -> None:
        """kill -9 of a node and everything on it, as when its machine is gone. number: in the order of their starts."""
        process = self._processes[number]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=20)

    def wait_for(self, port: int) -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.2)
        raise TimeoutError((self.folder / "node-0.log").read_text())

    def wait_for_nodes(self, count: int) -> None:
        code = (
            "import ray, time; ray.init(logging_level='ERROR')\n"
            f"while sum(node['Alive'] for node in ray.nodes()) < {count}: time.sleep(0.2)"
        )
        env = self.env | {"RAY_ADDRESS": f"127.0.0.1:{self.port}"}
        subprocess.run([sys.executable, "-c", code], env=env, timeout=300, check=True)

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # child processes that it left


def _end_with_parent() -> None:
    """Linux: SIGTERM when the test process ends, however it ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def clean_env() -> dict[str, str]:
    """The environment without variables that refer to another Ray."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
