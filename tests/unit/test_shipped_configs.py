"""What jobs/configs/ ships can be loaded, and its sweeps can start."""

from pathlib import Path

import pytest

from recray.config import load_config
from recray.tuning.check import check

CONFIGS = sorted((Path(__file__).parents[2] / "jobs" / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_is_valid(path: Path) -> None:
    config = load_config(str(path))
    assert bool(config.tune.space) == (path.stem not in ("demo", "ml-100k"))
    if config.tune.space:
        check(config, [])
