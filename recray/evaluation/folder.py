"""Where a split's report goes."""

from __future__ import annotations

from recray import storage
from recray.config import Config
from recray.errors import ConfigError
from recray.records import CheckpointRecord


def report_folder(config: Config, record: CheckpointRecord, split: str) -> str:
    """<run>/report for the test split, <run>/report-valid for validation.

    Raises ConfigError for the validation split of a checkpoint that was refitted on it.
    """
    if split == "valid" and record.config["training"]["refit"]:
        raise ConfigError(
            "this checkpoint was trained on the validation events, too (training.refit = true), so they tell nothing: "
            "train with --set training.refit=false, choose by --split valid, then refit"
        )
    return storage.join(config.run_uri, "report" if split == "test" else f"report-{split}")
