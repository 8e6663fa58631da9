"""Where a split's report goes."""

from __future__ import annotations

from recray import storage
from recray.config import Config
from recray.errors import ConfigError
from recray.records import CheckpointRecord


def report_folder(config: Config, record: CheckpointRecord, split: str) -> str:
    """<run>/report for the test split, <run>/report-valid for validation.

    Raises ConfigError for the validation split of a model or ranker that was refitted on it.
    """
    folders = [storage.join(config.retrieval.ranker, "checkpoint")] if config.retrieval.ranker else []
    for one in (record, *map(CheckpointRecord.read, folders)):
        if split == "valid" and one.config["training"]["refit"]:
            raise ConfigError(
                f"{one.config['run']['name']} was trained on the validation events, too (training.refit = true), so they tell "
                f"nothing: train with --set training.refit=false, choose by --split valid, then refit"
            )
    return storage.join(config.run_uri, "report" if split == "test" else f"report-{split}")
