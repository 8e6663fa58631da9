"""[tracking]: where metrics, parameters and reports are sent, and the options of each tracker.

A tracker outside the package keeps its `Options` and its `build` in one file (recray/tracking/README.md).
"""

from __future__ import annotations

import os
from typing import Any

from pydantic import Field, SerializeAsAny, field_validator

from recray.config.plugins import options_of, typed
from recray.config.section import Section


class TrackerOptions(Section):
    """Options of a tracker; its own `Options` extends it."""


class TensorboardOptions(TrackerOptions):
    folder: str | None = Field(
        None, description="folder of event files, one below it per training; unset: <output>/<name>/tensorboard"
    )

    @field_validator("folder")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        # A worker has another working directory.
        return value if value is None or "://" in value else os.path.abspath(os.path.expanduser(value))


class MlflowOptions(TrackerOptions):
    uri: str | None = Field(
        None,
        description="MLflow's tracking URI, e.g. http://mlflow:5000 or sqlite:///mlflow.db; unset: MLFLOW_TRACKING_URI, else sqlite in <output>/mlflow.db",
    )
    experiment: str = Field("recray", min_length=1, description="MLflow's experiment, made if it does not exist")

    @field_validator("uri")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        start = "sqlite:///"
        return start + os.path.abspath(value.removeprefix(start)) if value and value.startswith(start) else value


class RayMetricsOptions(TrackerOptions):
    pass


# Tracker name -> options. The tracker itself is recray/tracking/<name>.py.
SHIPPED: dict[str, type[TrackerOptions]] = {
    "tensorboard": TensorboardOptions,
    "mlflow": MlflowOptions,
    "ray_metrics": RayMetricsOptions,
}
BASE = TrackerOptions


class TrackingConfig(Section):
    """Where a training's parameters, metrics and reports are sent (recray/tracking/README.md)."""

    trackers: list[str] = Field(
        [], description="tensorboard, mlflow, ray_metrics, or trackers of your own; empty: none"
    )
    options: dict[str, SerializeAsAny[TrackerOptions]] = Field(
        {}, description="options of trackers, a table per name, e.g. [tracking.options.mlflow]"
    )

    @field_validator("trackers")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            options_of("tracker", name)
        return names

    @field_validator("options", mode="before")
    @classmethod
    def _typed(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: typed("tracker", name, table, key=name) for name, table in value.items()}
