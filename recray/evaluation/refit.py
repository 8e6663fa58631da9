"""The validation split of a model that was trained on it tells nothing."""

from __future__ import annotations

from recray.artifacts import CHECKPOINT, in_use
from recray.config import Config
from recray.errors import ConfigError
from recray.records import CheckpointRecord


def check_refit(config: Config, record: CheckpointRecord, split: str) -> None:
    """Raise ConfigError for the validation split of a model, or of its ranker, that was refitted on it."""
    rankers = [in_use(config.retrieval.ranker, CHECKPOINT).record] if config.retrieval.ranker else []
    for one in (record, *rankers):
        if split == "valid" and one.config["training"]["refit"]:
            raise ConfigError(
                f"{one.config['run']['name']} was trained on the validation events, too (training.refit = true), so they tell "
                f"nothing: train with --set training.refit=false, compare by --split valid, then refit"
            )
