"""Ray Train in a Ray of our own on one machine, without the parts that only a shared cluster needs.

Each is a process to start, one after the other, before the first step: an actor that asks the autoscaler for nodes, and
one that gives resources back when the driver dies, which also warns every few seconds where there is no dashboard.
"""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


class LocalTrainer(DataParallelTrainer):  # type: ignore[misc]
    """A TorchTrainer where `backend_config` is a TorchConfig."""

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()
        return [one for one in made if type(one).__name__ != "PlacementGroupCleanerCallback"]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        return super()._initialize_and_run_controller(**parts | {"scaling_policy": _Fixed(self.scaling_config)})


class _Fixed(FixedScalingPolicy):  # type: ignore[misc]
    """As many workers as configured, and nobody to ask for more nodes."""

    def _send_resource_request(self) -> None: ...

    def _maybe_send_resource_request(self) -> None: ...

    def _cancel_resource_request(self) -> None: ...
