"""All stages one after the other."""

from __future__ import annotations

from recray.config import Config
from recray.data.prepare import prepare
from recray.evaluation import evaluate
from recray.records import ReportRecord
from recray.retrieval.build import index
from recray.training.launch import train


def run_all(config: Config) -> ReportRecord:
    """prepare, train, index (of a retriever), evaluate. A stage that is complete for this configuration is not run again."""
    prepare(config)
    train(config)
    if config.model.family == "retriever":
        index(config)
    return evaluate(config)
