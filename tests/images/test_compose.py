"""docker/compose.yaml: a head, two workers and a notebook start; a job is submitted from outside with the token only."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ENGINE

REPOSITORY = Path(__file__).parents[2]
COMPOSE = ["podman-compose"] if ENGINE == "podman" else [ENGINE, "compose"]
TOKEN = secrets.token_hex(32)


def compose(*words: str, check: bool = True) -> None:
    environment = os.environ | {"RAY_AUTH_TOKEN": TOKEN}
    command = [*COMPOSE, "-f", str(REPOSITORY / "docker" / "compose.yaml"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert not check or done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def services() -> Iterator[None]:
    compose("up", "-d", "--no-build")
    yield
    compose("down", "-v", "-t", "5", check=False)


def answered(url: str, token: str | None = None) -> int:
    """The HTTP status; 0 without an answer."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return 0


def test_a_job_from_outside(services: None) -> None:
    url = "http://127.0.0.1:8265/api/jobs/"
    give_up = time.monotonic() + 240
    while answered(url, TOKEN) != 200 or answered("http://127.0.0.1:8888/api") != 200:
        assert time.monotonic() < give_up, "the head and the notebook did not answer"
        time.sleep(1)
    assert answered(url) == 401
    environment = os.environ | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_ADDRESS": "http://127.0.0.1:8265"
    }  # fmt: skip
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "recray"), "submit", str(REPOSITORY / "jobs" / "configs" / "demo.toml"),
            "--set", "run.output=/runs", "--set", "data.simulated.events=20000", "--set", "training.epochs=1",
            "--set", "scaling.num_workers=2",
        ],
        capture_output=True, text=True, timeout=500, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    nodes = json.loads(
        urllib.request.urlopen(
            urllib.request.Request(
                "http://127.0.0.1:8265/api/v0/nodes?filter_keys=state&filter_predicates=%3D&filter_values=ALIVE",
                headers={"Authorization": f"Bearer {TOKEN}"},
            ),
            timeout=10,
        ).read()
    )
    assert nodes["data"]["result"]["num_after_truncation"] == 4  # the notebook's node among them
