"""One small local Ray for all tests that need one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest


def _start(tries: int = 3) -> None:
    """Ray gives a node a fixed 30 s to register, which a machine with other work on every core may exceed."""
    import ray

    for left in reversed(range(tries)):
        try:
            # "local": without it Ray joins one that runs on this machine.
            ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR)
            return
        except Exception as error:  # Ray raises no narrower class
            ray.shutdown()
            if not left or "timed out during startup" not in str(error):
                raise


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A local Ray with two CPUs, quiet; stopped at the end of the session."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    from recray.cluster import runtime

    started = not ray.is_initialized()
    if started:
        _start()
    runtime.quieten_data()
    yield
    if started:
        ray.shutdown()
