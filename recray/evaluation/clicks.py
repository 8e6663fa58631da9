"""Evaluation of a ranker: how well it separates clicks from non-clicks, and how well its probabilities are calibrated.

Calibration is left out where prepare drew the negatives: the share of clicks is then that of `data.negatives.per_positive`,
and an item's share depends on how often it is drawn, so that no probability of a click can be checked.

Every impression of the split is scored. Shards are divided among `scaling.num_workers` tasks; metrics are computed from
all scores together, so they are exact and do not depend on the number of tasks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from recray import digests
from recray.artifacts import Run, report_stage
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.errors import DataError
from recray.evaluation import declared, scores, slices
from recray.evaluation.parallel import map_shards
from recray.evaluation.refit import check_refit
from recray.ids import UNKNOWN
from recray.layout import SCORES
from recray.loading.collate import impressions
from recray.metrics import CLICK_METRICS, ClickMetric, Clicks, click_metrics
from recray.metrics.clicks import interval
from recray.models import Ranker
from recray.records import Comparison, Interval, ReliabilityBin, ReportRecord, Slice
from recray.report.verdict import verdict
from recray.training import checkpoint

_BATCH = 8192
_Part = dict[str, np.ndarray]  # of one shard: user, target, label, weight, logit, length (of the history)


def evaluate_clicks(config: Config, split: str) -> ReportRecord:
    """Evaluate the run's checkpoint on a split; writes report.json."""
    started = time.perf_counter()
    run = Run(config)
    source = run.checkpoint()
    record = source.record
    dataset = PreparedDataset.of(run).known_to(record)
    check_refit([record], split)
    declared.check(config, dataset.record.features)
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
    of_any_score = {name: metric for name, metric in wanted.items() if not metric.needs_probabilities}
    drawn = dataset.record.config["data"]["negatives"] is not None
    systems = {
        "model": _Summary.of(model, config, of_any_score if drawn else wanted),
        "popularity": _Summary.of(popularity, config, of_any_score),
    }
    # -log p of what happened.
    loss = np.logaddexp(0.0, scored["logit"]) - label * scored["logit"]
    scores.write(artifact.uri, dataset, user, weight, {"model/log_loss": loss})
    report = ReportRecord(
        **artifact.lineage,
        config=config.model_dump(mode="json"),
        kind="clicks",
        split=split,
        metrics={name: one.metrics for name, one in systems.items()},
        comparisons=[_comparison(systems, config, of_any_score)],
        counts={
            "impressions": len(label),
            "clicks": int((label > 0).sum()),
            "users": model.num_users,
            "unknown_items": int((scored["target"] == UNKNOWN).sum()),
            "without_history": int((scored["length"] == 0).sum()),
        },
        slices=_slices(scored, dataset.item_counts(), config, declared.read(config, dataset)),
        reliability=[] if drawn else [ReliabilityBin(**vars(one)) for one in model.reliability()],
        files=digests.of_files(artifact.uri, [SCORES]),
        seconds=time.perf_counter() - started,
    )
    report = report.model_copy(update={"verdict": verdict(report, record, config)}).write(artifact.uri)
    run.publish(artifact)
    return report


@torch.inference_mode()
def _score_shards(dataset: PreparedDataset, model_uri: str, split: str, numbers: Iterable[int]) -> Iterator[_Part]:
    model, record = checkpoint.load_model(model_uri)
    assert isinstance(model, Ranker)
    history_length = int(record.config["model"]["history_length"])
    for number in numbers:
        table = dataset.read(dataset.record.shards[split][number].file)
        pieces = []
        for batch in impressions(table, _BATCH, history_length):
            assert batch.target_Q is not None and batch.label_Q is not None and batch.weight_Q is not None
            length = batch.history.lengths()
            columns = (batch.user_B, batch.target_Q, batch.label_Q, batch.weight_Q, model.logits(batch).float(), length)
            pieces.append([column.numpy() for column in columns])
        names = ("user", "target", "label", "weight", "logit", "length")
        yield {name: np.concatenate(column) for name, column in zip(names, zip(*pieces, strict=True), strict=True)}


@dataclass(frozen=True)
class _Summary:
    """Metrics of some scores, and their values over resampled users (none without `evaluation.bootstrap`)."""

    metrics: dict[str, Interval]
    resampled: dict[str, np.ndarray]

    @staticmethod
    def of(clicks: Clicks, config: Config, metrics: dict[str, ClickMetric]) -> _Summary:
        values, resamples = clicks.metrics(metrics=metrics), config.evaluation.bootstrap
        drawn = clicks.resampled(resamples, config.run.seed, metrics) if resamples else {}
        bounds = {name: interval(values_R) for name, values_R in drawn.items()}
        found = {}
        for name in metrics:
            low, high = bounds.get(name, (None, None))
            found[name] = Interval(value=values[name], low=low, high=high)
        return _Summary(found, drawn)


def _slices(scored: _Part, counts_N: np.ndarray, config: Config, features: Sequence[declared.Declared]) -> list[Slice]:
    """AUC by the user's history, as the model reads it, by popularity of the item, and by declared features."""
    popularity = counts_N[scored["target"]]
    groups = [("history", *group) for group in slices.of_histories(scored["length"])]
    groups += [
        ("popularity", *group) for group in slices.of_counts(np.where(scored["target"] == UNKNOWN, -1, popularity))
    ]
    for feature in features:
        ids = scored["user" if feature.role == "user" else "target"]
        masks = ((name, mask_N[ids] & (ids != UNKNOWN)) for name, mask_N in feature.groups)
        groups += [(feature.by, name, mask) for name, mask in masks if mask.any()]
    found, auc = [], {"auc": CLICK_METRICS["auc"]}
    for by, name, mask in groups:
        label = scored["label"][mask]
        if (label > 0).all() or (label <= 0).all():
            continue  # no pair to order
        user, weight = scored["user"][mask], scored["weight"][mask]
        scores = {"model": scored["logit"][mask], "popularity": popularity[mask].astype(np.float64)}
        systems = {n: _Summary.of(Clicks(user, score, label, weight), config, auc) for n, score in scores.items()}
        gain = _comparison(systems, config, auc)
        found.append(
            Slice(
                by=by,
                group=name,
                metric="auc",
                size=len(label),
                values={n: one.metrics["auc"] for n, one in systems.items()},
                gains={"popularity": Interval(value=gain.gain, low=gain.low, high=gain.high)},
            )
        )
    return found


def _comparison(systems: dict[str, _Summary], config: Config, metrics: dict[str, ClickMetric]) -> Comparison:
    """The model against popularity, by the metric that selects the model if popularity has it; both on the same users."""
    metric = config.training.metric if config.training.metric in metrics else "auc"
    sign = 1 if metrics[metric].higher_is_better else -1
    model, other = systems["model"], systems["popularity"]
    gain = sign * (model.metrics[metric].value - other.metrics[metric].value)
    low, high = None, None
    if model.resampled:
        low, high = interval(sign * (model.resampled[metric] - other.resampled[metric]))
    return Comparison(system="model", other="popularity", metric=metric, gain=gain, low=low, high=high)
