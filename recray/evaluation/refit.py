"""The validation split of a model that was trained on it measures nothing."""

from __future__ import annotations

from collections.abc import Sequence

from recray.errors import ConfigError
from recray.records import CheckpointRecord


def check_refit(models: Sequence[CheckpointRecord], split: str) -> None:
    """Raise ConfigError if `split` is "valid" and one of the models was refitted on it."""
    for one in models:
        if split == "valid" and one.config["training"]["refit"]:
            raise ConfigError(
                f"{one.config['run']['name']} was also trained on the validation events (training.refit = true), so they "
                f"measure nothing: train with --set training.refit=false, compare by --split valid, then refit"
            )
