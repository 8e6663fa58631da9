"""Evaluation of a ranker: how well it separates clicks from non-clicks, and how well its probabilities are calibrated.

Every impression of the split is scored. Shards are divided among `scaling.num_workers` tasks; metrics are computed from
all scores together, so they are exact and do not depend on the number of tasks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import torch

from recray import storage
from recray.artifacts import Run, report_stage
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.errors import DataError
from recray.evaluation.parallel import map_shards
from recray.evaluation.refit import check_refit
from recray.ids import UNKNOWN
from recray.loading.collate import impressions
from recray.metrics import ClickMetric, Clicks, click_metrics
from recray.models import Ranker
from recray.records import Interval, ReliabilityBin, ReportRecord
from recray.training import checkpoint

_BATCH = 8192
_Part = dict[str, np.ndarray]  # of one shard: user, target, label, weight, logit


def evaluate_clicks(config: Config, split: str) -> ReportRecord:
    """Evaluate the run's checkpoint on a split; writes report.json."""
    started = time.perf_counter()
    run = Run(config)
    dataset, source = PreparedDataset.of(run), run.checkpoint()
    record = source.record
    check_refit([record], split)
    artifact = run.artifact(report_stage(split), [record.id, dataset.record.id])
    if not run.begin(artifact):
        return artifact.record
    work = partial(_score_shards, dataset, source.uri, split)
    parts = map_shards("evaluate", work, config.scaling, len(dataset.record.shards[split]))
    if not parts:
        raise DataError(f"the {split} split has no impressions: check data.split and data.min_history")
    scored = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    user, label, weight = scored["user"], scored["label"], scored["weight"]
    model = Clicks(user, scored["logit"], label, weight)
    popularity = Clicks(user, dataset.item_counts()[scored["target"]].astype(np.float64), label, weight)
    wanted = click_metrics(config)
    metrics = {
        "model": _summary(model, config, wanted),
        "popularity": _summary(popularity, config, {n: m for n, m in wanted.items() if not m.needs_probabilities}),
    }
    report = ReportRecord(
        **artifact.lineage,
        config=config.model_dump(mode="json"),
        kind="clicks",
        split=split,
        metrics=metrics,
        counts={
            "impressions": len(label),
            "clicks": int((label > 0).sum()),
            "users": model.num_users,
            "unknown_items": int((scored["target"] == UNKNOWN).sum()),
        },
        reliability=[ReliabilityBin(**vars(one)) for one in model.reliability()],
        seconds=time.perf_counter() - started,
    ).write(artifact.uri)
    run.publish(artifact)
    return report


@torch.inference_mode()
def _score_shards(dataset: PreparedDataset, model_uri: str, split: str, numbers: Iterable[int]) -> Iterator[_Part]:
    model, record = checkpoint.load_model(model_uri)
    assert isinstance(model, Ranker)
    history_length = int(record.config["model"]["history_length"])
    for number in numbers:
        table = storage.read_table(dataset.file_uri(dataset.record.shards[split][number].file))
        pieces = []
        for batch in impressions(table, _BATCH, history_length):
            assert batch.target_Q is not None and batch.label_Q is not None and batch.weight_Q is not None
            columns = (batch.user_B, batch.target_Q, batch.label_Q, batch.weight_Q, model.logits(batch).float())
            pieces.append([column.numpy() for column in columns])
        names = ("user", "target", "label", "weight", "logit")
        yield {name: np.concatenate(column) for name, column in zip(names, zip(*pieces, strict=True), strict=True)}


def _summary(clicks: Clicks, config: Config, metrics: dict[str, ClickMetric]) -> dict[str, Interval]:
    values, resamples = clicks.metrics(metrics=metrics), config.evaluation.bootstrap
    bounds = clicks.bootstrap(resamples, config.run.seed, metrics) if resamples else {}
    out = {}
    for name in metrics:
        low, high = bounds.get(name, (None, None))
        out[name] = Interval(value=values[name], low=low, high=high)
    return out
