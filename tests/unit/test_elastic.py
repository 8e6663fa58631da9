"""How many workers train, and when their number changes, without a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.configs import simulated_table
from recray.cluster import private_ray, resources
from recray.config import Config, ScalingConfig, parse_config
from recray.errors import ConfigError
from recray.training import elastic

pytestmark = pytest.mark.timeout(30)


def _config(folder: Path, *keys: str) -> Config:
    return parse_config(simulated_table(folder), keys)


def test_sizes_divide_the_global_batch(tmp_path: Path) -> None:
    keys = ("training.global_batch_size=24", "scaling.num_workers=6")
    assert elastic.sizes(_config(tmp_path, *keys)) == [6]
    assert elastic.sizes(_config(tmp_path, *keys, "scaling.min_workers=1")) == [6, 4, 3, 2, 1]
    accumulated = _config(tmp_path, *keys, "scaling.min_workers=2", "training.accumulation_steps=2")
    assert elastic.sizes(accumulated) == [6, 4, 3, 2]
    with pytest.raises(ConfigError, match=r"scaling\.min_workers = 7 exceeds scaling\.num_workers = 6"):
        _config(tmp_path, *keys, "scaling.min_workers=7")


@pytest.mark.parametrize(
    ("nodes", "draining", "reason"),
    [
        ([1, 1, 2], [0], "there are nodes for all 2 training workers now"),  # one came
        ([2, 1, 2], [0], "there are nodes for all 2 training workers now"),  # Ray learned late of the one that was lost
        ([1, 1, 1], [0, 0, 2], "2 nodes are about to be taken away"),
        ([1, 1, 1], [0, 1], "1 node is about to be taken away"),
        ([2, 2, 2, 2, 2], [0], None),  # others use one of them
        ([1, 1, 1, 1, 1], [0], None),
    ],
)
def test_workers_are_asked_to_stop_when_their_number_should_change(
    nodes: list[int], draining: list[int], reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nodes: of one CPU each, at each look; draining: how many of them are, the last value from then on."""
    looks, notices = iter(nodes), iter(draining)
    known, watch = [draining[0]], None

    def now() -> list[dict[str, float]]:
        count = next(looks, None)
        if count is None:  # it has looked at all
            watch._ended.set()
            count = nodes[-1]
        return [{"CPU": 1.0}] * count

    def leaving() -> set[str]:
        known[0] = next(notices, known[0])
        return {f"node-{number}" for number in range(known[0])}

    monkeypatch.setattr(elastic, "_LOOK_EVERY", 0.001)
    monkeypatch.setattr(resources, "of_nodes", now)
    monkeypatch.setattr(private_ray, "draining_nodes", leaving)
    watch = elastic.Watch(str(tmp_path), ScalingConfig(num_workers=2, min_workers=1), missing=1)
    watch._thread.start()
    watch._thread.join(20)
    assert watch.reason == reason
    assert (tmp_path / "stop").exists() == (reason is not None)
