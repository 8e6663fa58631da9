"""Unit tests run without Ray: importing it costs seconds, and its threads outlive the test that started them."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


def pytest_collection_finish(session: pytest.Session) -> None:
    if all("unit" in item.path.parts for item in session.items) and "ray" in sys.modules:
        raise pytest.UsageError("a module of tests/unit imports ray: move the test to tests/ray")


@pytest.fixture(autouse=True)
def _without_ray() -> Iterator[None]:
    """Fails the test that imports Ray, directly or through the code it calls."""
    before = "ray" in sys.modules  # when other folders are collected in the same process
    yield
    assert before or "ray" not in sys.modules, "this unit test imported ray: move it to tests/ray, or import it lazily"
