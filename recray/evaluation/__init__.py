"""The evaluate stage: lists of a retriever and its index, or clicks predicted by a ranker."""

from __future__ import annotations

from recray.config import Config
from recray.evaluation.clicks import evaluate_clicks
from recray.evaluation.lists import evaluate_lists
from recray.records import ReportRecord


def evaluate(config: Config, split: str = "test") -> ReportRecord:
    """Evaluate <run>/checkpoint, of a retriever with its index, on a split; writes <run>/report/report.json.

    split: "test", or "valid" to choose by, whose report goes to <run>/report-valid. Raises LineageError when the index
    was built from another checkpoint, ConfigError for the validation split of a refitted checkpoint.
    """
    if config.model.family == "ranker":
        return evaluate_clicks(config, split)
    return evaluate_lists(config, split)
