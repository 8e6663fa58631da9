"""What jobs/configs/ ships can be loaded, and its sweeps can start."""

from pathlib import Path

import pytest

from helpers.configs import SHIPPED, shipped
from recray.tuning.check import check


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_configuration_is_valid(path: Path) -> None:
    config = shipped(path)
    assert config.run.name == path.stem
    assert bool(config.tune.space) == (path.stem not in ("demo", "ml-100k"))
    if config.tune.space:
        check(config, [])
