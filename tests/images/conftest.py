"""What tests of images share: the container engine, and the image that `make images` has built.

CONTAINER_ENGINE is `docker` or `podman`; RECRAY_TEST_IMAGE is the image.
"""

from __future__ import annotations

import os
import subprocess

import pytest

ENGINE = os.environ.get("CONTAINER_ENGINE", "docker")
IMAGE = os.environ.get("RECRAY_TEST_IMAGE", "")
BUILD_OPTIONS = os.environ.get("CONTAINER_BUILD_OPTIONS", "").split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.slow)
        item.add_marker(pytest.mark.timeout(900))
        if not IMAGE:
            item.add_marker(pytest.mark.skip(reason="RECRAY_TEST_IMAGE names no image: make images"))


def engine(*words: str, check: bool = True) -> str:
    """What a command of the container engine prints."""
    done = subprocess.run([ENGINE, *words], capture_output=True, text=True, timeout=580)
    assert not check or done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout


def run(*command: str, options: tuple[str, ...] = ()) -> str:
    """What a command prints in a new container."""
    return engine("run", "--rm", "--init", "--shm-size=1g", *options, IMAGE, *command)
