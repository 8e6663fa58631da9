"""What the figures of a report say, in words: compared with baselines, out of reach, training, index, what to try next.

A recommender is called better or worse only where the 95 % interval of the difference, paired over users, excludes 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from recray.config import Config
from recray.records import CheckpointRecord, Comparison, ReportRecord
from recray.report.text import TITLES

_NAMES = TITLES | {
    "model": "the model",
    "index": "the index",
    "blended": "the blend",
    "recency": "the model with recent counts",
    "reranked": "the re-ranked list",
    "hindsight": "popularity of the split itself",
}
_SHOWN = 0.0005  # share from which it is not printed as 0.0%
_MANY = 0.05  # share of targets from which a reason to miss them is worth a change
_LOSS = 0.01  # share of a metric from which what the index loses is


def verdict(report: ReportRecord, model: CheckpointRecord, config: Config) -> list[str]:
    """Sentences, the most important ones first. config: of the report; model: the checkpoint that it evaluates."""
    clicks = report.kind == "clicks"
    compared = [_sentence(one) for one in report.comparisons if one.other != "oracle"]  # see _learned
    reached = [*_clicks(report)] if clicks else [*_learned(report), *_targets(report, config), *_index(report)]
    advice = [*_training_advice(model, config), *(_click_advice(report) if clicks else _list_advice(report, config))]
    advice = advice or ["a search of learning rate, width and dropout: recray tune"]
    return [*compared, *reached, *_training(model), *(f"try next: {one}" for one in advice)]


def result(one: Comparison) -> str:
    """ "better", "worse", or "" where the interval includes 0 or there is none."""
    if one.low is None or one.high is None:
        return ""
    return "better" if one.low > 0 else "worse" if one.high < 0 else ""


def _sentence(one: Comparison) -> str:
    system, other = _NAMES.get(one.system, one.system), _NAMES.get(one.other, one.other)
    if one.low is None or one.high is None:
        return f"{system} against {other}: {one.metric} {one.gain:+.4f}, without an interval (evaluation.bootstrap = 0)"
    word = result(one)
    if not word:
        found = f"{one.gain:+.4f} ({one.low:+.4f} to {one.high:+.4f})"
        return f"no clear difference between {system} and {other}: {one.metric} {found}"
    low, high = sorted((abs(one.low), abs(one.high)))
    return f"{system} is {word} than {other}: {one.metric} by {abs(one.gain):.4f} ({low:.4f} to {high:.4f})"


def _learned(report: ReportRecord) -> Iterator[str]:
    """Where the model lies between popularity and the oracle."""
    if not {"popularity", "oracle"} <= report.metrics.keys():
        return
    name = next(one for one in report.metrics["model"] if one.startswith("ndcg@"))
    low, model, high = (report.metrics[one][name].value for one in ("popularity", "model", "oracle"))
    if low < high:
        share = (
            f"{(model - low) / (high - low):.0%} of what can be learned"
            if model >= low
            else "nothing of what can be learned"
        )
        yield f"{name}: popularity {low:.4f}, the model {model:.4f}, the oracle {high:.4f}; the model has {share}"


def _targets(report: ReportRecord, config: Config) -> Iterator[str]:
    unknown, seen, new = shares(report, config)
    if unknown + seen >= _SHOWN:
        reasons = [f"{unknown:.1%} are items that the model does not know"] if unknown >= _SHOWN else []
        reasons += [f"{seen:.1%} are items that the user has chosen before"] if seen >= _SHOWN else []
        yield f"{unknown + seen:.1%} of the targets cannot be hit: {', '.join(reasons)}"
    if new >= _SHOWN:
        yield f"{new:.1%} of all targets are of users without a history, who are asked apart"


def shares(report: ReportRecord, config: Config) -> tuple[float, float, float]:
    """Of the targets asked for: unknown ones, and those that filter_seen leaves out. Of all targets: those of new users."""
    counts = report.counts
    asked, new = max(counts["targets"], 1), counts["targets_without_history"]
    seen = counts["seen_targets"] if config.evaluation.filter_seen else 0
    return counts["unknown_targets"] / asked, seen / asked, new / max(counts["targets"] + new, 1)


def _index(report: ReportRecord) -> Iterator[str]:
    for metric, lost, value in _lost(report):
        verb = "loses" if lost < 0 else "gains"
        found = (
            f"{verb} {abs(lost):.4f} of {metric} ({abs(lost) / max(value, 1e-12):.1%})"
            if round(lost, 4)  # sums in another order differ in their last bits
            else f"loses no {metric}"
        )
        yield f"the index {found} against exact search"


def _lost(report: ReportRecord) -> Iterator[tuple[str, float, float]]:
    """Metric, its value by the index minus that by exact search, and the latter."""
    for name, lost in report.index.items():
        metric = name.removesuffix("_lost")
        if metric != name and metric.startswith("ndcg@"):
            yield metric, lost, report.metrics["model"][metric].value


def _training(model: CheckpointRecord) -> Iterator[str]:
    trained = len(model.history)
    if model.best_epoch and trained:
        yield f"best epoch {model.best_epoch} of {trained}" + (
            ": train longer" if model.best_epoch == trained else ", chosen on validation"
        )


def _training_advice(model: CheckpointRecord, config: Config) -> list[str]:
    trained = len(model.history)
    if not model.best_epoch or not trained:
        return []
    if model.best_epoch == trained:
        return [f"more epochs: the last one was the best (training.epochs = {config.training.epochs})"]
    if model.best_epoch == 1:
        return [
            f"a lower learning rate: the first epoch was the best (optim.learning_rate = {config.optim.learning_rate})"
        ]
    return []


def _list_advice(report: ReportRecord, config: Config) -> Iterator[str]:
    """What the figures suggest, the largest gain first."""
    beaten = {one.other for one in report.comparisons if result(one) == "better" and one.system == _final(report)}
    rivals = [one for one in report.metrics if one not in beaten]
    counters = {"rolling_popularity", "transitions"} & set(rivals)
    if counters and not config.retrieval.recency.enabled:
        yield "recent counts next to the model: retrieval.recency.enabled = true"
    if counters or "recent_popularity" in rivals:
        yield (
            "newer training data: what users choose changes faster than the model; train more often, "
            "sample recent events more often (training.half_life), or let the log begin later (data.split.start)"
        )
    if "popularity" in rivals:
        yield "a look at the data and the learning rate: the model does not beat a count of the items"
    if "item_knn" in rivals and not config.retrieval.item_knn_weight:
        yield "the item-item baseline blended in: retrieval.item_knn_weight, chosen with recray evaluate --split valid"
    unknown, seen, new = shares(report, config)
    if unknown > _MANY and not config.training.refit:
        yield "training.refit = true, or training more often: many targets are new items"
    if seen > _MANY:
        yield "evaluation.filter_seen = false: users choose items again"
    if new > _MANY:
        yield "an answer for new users, such as popular items (recray recommend gives them)"
    if any(lost < -_LOSS * value for _, lost, value in _lost(report)):
        yield "a higher retrieval.recall_target, or retrieval.index = 'Flat'"


def _final(report: ReportRecord) -> str:
    return next(one for one in ("reranked", "recency", "blended", "model") if one in report.metrics)


def _clicks(report: ReportRecord) -> Iterator[str]:
    entropy = report.metrics["model"].get("normalized_entropy")
    if entropy is not None and math.isfinite(entropy.value):
        low, high = (entropy.value if x is None else x for x in (entropy.low, entropy.high))
        word = "worse" if low > 1 else "better" if high < 1 else "no clear improvement"
        than = "than" if word in ("worse", "better") else "on"
        yield (
            f"probabilities are {word} {than} the share of clicks as a constant prediction: normalised entropy "
            f"{entropy.value:.4f} ({low:.4f} to {high:.4f}), 1 is the constant"
        )
    popularity = report.metrics["popularity"]["auc"]
    high = popularity.value if popularity.high is None else popularity.high
    if high < 0.5:
        yield (
            f"popularity has AUC {popularity.value:.4f}: clicks are on the less popular items, and the opposite order has "
            f"{1 - popularity.value:.4f}"
        )


def _click_advice(report: ReportRecord) -> Iterator[str]:
    entropy = report.metrics["model"].get("normalized_entropy")
    if entropy is not None and entropy.value > 1:
        yield "training.patience and a lower learning rate: the model is sure where it is wrong"
    if any(result(one) != "better" for one in report.comparisons):
        yield "features that tell clicks apart (data.columns.context, data.items): the model does not beat a count of the items"
