"""Commands on a cluster that is gone, as a user runs them: a plain error within seconds, and SIGTERM obeyed meanwhile."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

CONFIG = "[data]\nsource = 'simulated'\n[scaling]\nnum_workers = 1\n"


def _command(folder: Path, *arguments: str, address: str) -> "subprocess.Popen[str]":
    file = folder / "my.toml"
    file.write_text(f"[run]\noutput = '{folder}/runs'\n{CONFIG}")
    words = [str(file) if word == "CONFIG" else word for word in arguments]
    return subprocess.Popen(
        [sys.executable, "-m", "recray", *words],
        env=os.environ | {"RAY_ADDRESS": address, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "arguments", [("train", "CONFIG"), ("prepare", "CONFIG"), ("tune", "CONFIG"), ("doctor", "--env")]
)
def test_a_command_ends_with_one_line(arguments: tuple[str, ...], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # bound and not listening: refused
        process = _command(tmp_path, *arguments, address=f"127.0.0.1:{probe.getsockname()[1]}")
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 2 and not output
    assert errors.startswith("ClusterError: cannot join a Ray cluster at RAY_ADDRESS = 127.0.0.1:")
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize("arguments", [("train", "CONFIG"), ("submit", "CONFIG", "--address", "ADDRESS")])
def test_a_command_that_waits_for_an_answer_obeys_sigterm(arguments: tuple[str, ...], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        process = _command(tmp_path, *(address if word == "ADDRESS" else word for word in arguments), address=address)
        connection, _ = silent.accept()  # from here on it waits
        process.send_signal(signal.SIGTERM)
        before = time.monotonic()
        assert process.wait(30) == -signal.SIGTERM
        assert time.monotonic() - before < 2
        connection.close()
        process.communicate()
