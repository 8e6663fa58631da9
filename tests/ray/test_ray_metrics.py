"""The tracker ray_metrics: what Ray's exporter on the node gives to Prometheus."""

from __future__ import annotations

import contextlib
import time
import urllib.request
from collections.abc import Iterator

import pytest
import ray

from recray.config.trackers import RayMetricsOptions
from recray.tracking import TrackedRun
from recray.tracking.ray_metrics import build

RUN = TrackedRun("news-1a2b3c4d", "1a2b3c4d", "folder", "runs/news", "runs", {}, {"recray.run": "news"}, [])


def _exported(port: int) -> Iterator[str]:
    """recray's lines of the node's exporter, asked until there are any: Ray sends metrics every few seconds."""
    end = time.monotonic() + 90
    while time.monotonic() < end:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer,
        ):
            found = [line for line in answer.read().decode().splitlines() if line.startswith("ray_recray_")]
            if found:
                return iter(found)
    return iter(())


@pytest.mark.usefixtures("ray_local")
def test_values_are_gauges_of_the_node() -> None:
    tracker = build(RayMetricsOptions(), RUN)
    tracker.metrics({"train/loss": 0.5, "validation/ndcg@10": 0.25, "train/epoch_loss": float("nan")}, 7)
    found = {}
    for line in _exported(ray.nodes()[0]["MetricsExportPort"]):
        name, _, rest = line.partition("{")
        assert 'run="news"' in rest and 'checkpoint="1a2b3c4d"' in rest
        found[name] = float(rest.rpartition(" ")[2])
    assert found == {"ray_recray_train_loss": 0.5, "ray_recray_validation_ndcg_at_10": 0.25, "ray_recray_step": 7.0}
