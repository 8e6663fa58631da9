"""Fixtures and rules for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import recray  # noqa: F401  # before torch: it bounds how long OpenMP's threads spin

SHARED = Path(__file__).parents[2] / "shared" / "data"
SLOW_TIMEOUT = 600  # seconds; a slow test may set its own with `@pytest.mark.timeout`

# No test joins a Ray that it did not start.
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("RAY_API_SERVER_ADDRESS", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the public logs; they are not redistributed, so a test that needs them skips where they are absent."""
    if not SHARED.is_dir():
        pytest.skip(f"the public logs are not at {SHARED}")
    return SHARED
