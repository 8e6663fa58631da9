"""The evaluate stage: ranked lists of a retriever and its index, or click predictions of a ranker."""

from __future__ import annotations

from recray.config import Config
from recray.evaluation.clicks import evaluate_clicks
from recray.evaluation.lists import evaluate_lists
from recray.records import ReportRecord


def evaluate(config: Config, split: str = "test") -> ReportRecord:
    """Evaluate the checkpoint of a run, a retriever together with its index, and write report.json.

    split: "test" to report, "valid" to compare configurations by. Raises LineageError if there is no checkpoint of this
    configuration, and ConfigError for the validation split of a refitted checkpoint.
    """
    if config.model.family == "ranker":
        return evaluate_clicks(config, split)
    return evaluate_lists(config, split)
