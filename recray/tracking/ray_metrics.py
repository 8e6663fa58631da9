"""Ray's metrics: gauges that the cluster's Prometheus scrapes from every node, next to Ray's own.

A value `train/events_per_second` is the gauge `ray_recray_train_events_per_second`, with the labels `run` (run.name) and
`checkpoint` (identity of the checkpoint). Only metrics are sent: Prometheus holds neither parameters nor files.
cluster/grafana.json is a dashboard of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from recray.config.trackers import RayMetricsOptions as Options
from recray.errors import ConfigError
from recray.tracking import Status, TrackedRun

__all__ = ["Options", "build", "gauge_name"]

_LABELS = ("run", "checkpoint")


def gauge_name(value: str) -> str:
    """'validation/ndcg@10' -> 'recray_validation_ndcg_at_10'; Ray's exporter puts 'ray_' before it."""
    return "recray_" + re.sub(r"[^A-Za-z0-9_]", "_", value.replace("@", "_at_"))


class _RayMetrics:
    def __init__(self, gauge: type[Any], run: TrackedRun) -> None:
        self._gauge, self._gauges = gauge, dict[str, Any]()
        self._labels = dict(zip(_LABELS, (run.tags["recray.run"], run.identity), strict=True))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        for name, value in {**values, "step": step}.items():
            if name not in self._gauges:
                self._gauges[name] = self._gauge(gauge_name(name), f"recray: {name}", _LABELS)
            if math.isfinite(value):
                self._gauges[name].set(value, self._labels)

    def files(self, uris: Sequence[str]) -> None:
        pass

    def close(self, status: Status) -> None:
        """The last values stay until the process ends, as those of Ray's own gauges do."""


def build(options: Options, run: TrackedRun) -> _RayMetrics:
    import ray

    if not ray.is_initialized():
        raise ConfigError("no Ray runs in this process: training on one worker of this machine does not start it")
    from ray.util.metrics import Gauge

    return _RayMetrics(Gauge, run)
