"""Fixtures that every test may use."""

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the public logs; they are not redistributed, so a test that needs them skips where they are absent."""
    if not SHARED.is_dir():
        pytest.skip(f"the public logs are not at {SHARED}")
    return SHARED
