"""The evaluate stage: ranked lists of a retriever and its index, or click predictions of a ranker."""

from __future__ import annotations

from recray import locks, storage, tracking
from recray.artifacts import Run, in_use, report_stage
from recray.cluster.stage_task import on_cluster
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.evaluation.clicks import evaluate_clicks
from recray.evaluation.lists import evaluate_lists
from recray.records import ReportRecord
from recray.report import page


def evaluate(config: Config, split: str = "test") -> ReportRecord:
    """Evaluate the checkpoint of a run, a retriever together with its index, and write report.json and report.html.

    split: "test" to report, "valid" to compare configurations by. Raises LineageError if there is no checkpoint of this
    configuration, and ConfigError for the validation split of a refitted checkpoint.
    """
    return on_cluster("evaluate", config.scaling, _evaluate, config, split)


def _evaluate(config: Config, split: str) -> ReportRecord:
    with locks.exclusive(storage.join(config.run_uri, report_stage(split).name)):
        report = evaluate_clicks(config, split) if config.model.family == "ranker" else evaluate_lists(config, split)
        folder = in_use(config.run_uri, report_stage(split)).uri
        if not storage.exists(storage.join(folder, page.FILE)):
            page.write(folder)
            _track(config, report, folder)
    return report


def _track(config: Config, report: ReportRecord, folder: str) -> None:
    """Add the report to the run of its training in the configured trackers."""
    if config.tracking.trackers:
        checkpoint, dataset = Run(config).checkpoint(), PreparedDataset.of(Run(config))
        values = {
            f"{report.split}/{system}/{name}": one.value
            for system, metrics in report.metrics.items()
            for name, one in metrics.items()
        }
        files = [storage.join(folder, name) for name in (ReportRecord.file_name(), page.FILE)]
        there = [uri for uri in files if storage.exists(uri)]
        record = dataset.record
        tracking.report(config, record, dataset.uri, checkpoint.uri, values, checkpoint.record.step, there)
