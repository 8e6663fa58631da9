"""The report as plain text: what was asked and can be hit, one row per recommender and column per metric, the verdict."""

from __future__ import annotations

import math

from recray.errors import LineageError
from recray.metrics.ranking import METRICS as LIST_METRICS
from recray.records import Interval, ReportRecord

TITLES = {
    "model": "model (exact search)",
    "index": "model (index)",
    "blended": "model + item-item baseline",
    "recency": "model + recent counts",
    "reranked": "reranked",
    "popularity": "popularity",
    "recent_popularity": "recent popularity",
    "rolling_popularity": "rolling popularity",
    "transitions": "recent transitions",
    "hindsight": "popularity of the split",
    "item_knn": "item-item baseline",
    "oracle": "oracle (upper bound)",
}
_BEYOND = ("coverage", "gini", "arp", "novelty", "ild")  # one value for all lists, without intervals

_COUNTS = {  # what a report of each kind counts
    "clicks": ("impressions", "clicks", "users", "unknown_items", "without_history"),
    "lists": (
        "catalogue",
        "queries",
        "queries_without_history",
        "seen_targets",
        "short_lists",
        "targets",
        "targets_without_history",
        "unknown_targets",
        "users",
    ),
}


def render(report: ReportRecord) -> str:
    """The report of a retriever or of a ranker as lines of text. Raises LineageError for one of another version."""
    missing = [name for name in _COUNTS[report.kind] if name not in report.counts]
    if missing or "model" not in report.metrics:
        raise LineageError(
            f"the report was written by another version of recray ({report.recray_version or '?'}), without "
            f"{', '.join(missing) or 'the figures of the model'}: run `recray evaluate` again"
        )
    return _clicks(report) if report.kind == "clicks" else _lists(report)


def _clicks(report: ReportRecord) -> str:
    """The table of metrics, then predicted against observed click rates."""
    counts, model = report.counts, report.metrics["model"]
    heads = {"normalized_entropy": "norm.entropy", "gauc_impressions": "gauc_impr"}
    lines = [
        f"{report.split} split: {counts['impressions']:,} impressions, {counts['clicks']:,} clicks, {counts['users']:,} users",
        f"{counts['unknown_items'] / counts['impressions']:.1%} of the impressions are of unknown items, "
        f"{counts['without_history'] / counts['impressions']:.1%} of users without a history",
        "",
        f"{'':27}" + "".join(f"{heads.get(name, name):>13}" for name in model),
    ]
    for row, values in report.metrics.items():
        cells = (_cell(values[name].value) if name in values else f"{'-':>13}" for name in model)
        lines.append(f"{row:27}" + "".join(cells))
    if model["auc"].low is not None:
        lines.append(f"{'  model, 95 % interval +-':27}" + "".join(_cell(_half(one)) for one in model.values()))
    if report.reliability:
        lines += ["", "reliability      predicted     observed  impressions"]
    else:
        lines += [
            "",
            "no calibration: negatives were drawn (data.negatives), so the share of clicks is not that of real impressions",
        ]
    lines += [f"{'':13}{one.predicted:13.4f}{one.observed:13.4f}{one.impressions:13,}" for one in report.reliability]
    return "\n".join([*lines, *_verdict(report)])


def _lists(report: ReportRecord) -> str:
    """A table for each K, then counts and what the index loses."""
    ks = sorted({int(name.split("@")[1]) for name in report.metrics["model"]})
    lines = _asked(report)
    for k in ks:
        lines += _table(report, [f"{name}@{k}" for name in ("recall", "hr", "ndcg", "mrr", "map")])
    lines += _table(report, [f"{name}@{ks[-1]}" for name in _BEYOND])
    if own := [name for name in report.metrics["model"] if name.partition("@")[0] not in (*LIST_METRICS, *_BEYOND)]:
        lines += _table(report, own)
    return "\n".join([*lines, *_new_users(report), "", *_stages(report), *_verdict(report)])


def _new_users(report: ReportRecord) -> list[str]:
    """The queries without a history, by what answers them; at the first K only."""
    if not report.new_users:
        return []
    k = next(iter(report.metrics["model"])).partition("@")[2]
    names = [f"{name}@{k}" for name in ("recall", "hr", "ndcg", "mrr", "map")]
    lines = [
        "",
        f"{report.counts['queries_without_history']:,} queries of users without a history, not in the table above",
    ]
    lines.append(f"{'':27}" + "".join(f"{name:>13}" for name in names))
    for row, values in report.new_users.items():
        lines.append(f"{TITLES.get(row, row):27}" + "".join(_cell(values[n]) for n in names))
    return lines


def _asked(report: ReportRecord) -> list[str]:
    """How many queries and targets there are, and how much of them can be hit."""
    counts, filters = report.counts, report.config["evaluation"]["filter_seen"]
    asked, new = max(counts["targets"], 1), counts["targets_without_history"]
    missed = counts["unknown_targets"] + (counts["seen_targets"] if filters else 0)
    seen = f"{counts['seen_targets'] / asked:.1%} had been chosen before by their user"
    return [
        f"{report.split} split, full ranking over {counts['catalogue']:,} items: {counts['queries']:,} queries of "
        f"{counts['users']:,} users, {counts['targets']:,} targets",
        f"at most {1 - missed / asked:.1%} of the targets can be hit: {counts['unknown_targets'] / asked:.1%} are unknown items, "
        f"{seen}" + (" (evaluation.filter_seen)" if filters else ", which may be recommended again"),
        f"apart, since their users have no history: {counts['queries_without_history']:,} queries with {new:,} targets "
        f"({new / max(asked + new, 1):.1%} of all)",
    ]


def _verdict(report: ReportRecord) -> list[str]:
    paired = " (differences with 95 % intervals, paired over users)" if report.comparisons else ""
    left_out = [f"  {TITLES.get(name, name)} is left out: {why}" for name, why in report.left_out.items()]
    return ["", f"verdict{paired}", *(f"  {one}" for one in report.verdict), *left_out]


def _table(report: ReportRecord, names: list[str]) -> list[str]:
    """These metrics of every recommender, and the half width of the model's intervals."""
    lines = ["", f"{'':27}" + "".join(f"{name:>13}" for name in names)]
    for row, values in report.metrics.items():
        lines.append(f"{TITLES.get(row, row):27}" + "".join(_cell(values[n].value) for n in names))
    model = report.metrics["model"]
    if model[names[0]].low is not None:
        lines.append(f"{'  model, 95 % interval +-':27}" + "".join(_cell(_half(model[n])) for n in names))
    if names[0] in report.reachable:
        lines.append(f"{'all targets that can be hit':27}" + "".join(f"{report.reachable[n]:13.4f}" for n in names))
    return lines


def _cell(value: float) -> str:
    return f"{value:13.4f}" if math.isfinite(value) else f"{'undefined':>13}"


def _half(interval: Interval) -> float:
    return ((interval.high or 0.0) - (interval.low or 0.0)) / 2


def _stages(report: ReportRecord) -> list[str]:
    """What the index loses and what re-ranking adds."""
    lines = (
        [f"{report.counts['short_lists']:,} lists are shorter than asked for"] if report.counts["short_lists"] else []
    )
    if report.index:
        lines.append(
            "index: "
            + "; ".join(
                f"{name} {value:+.4f}" if "lost" in name else f"{name} {value:.4f}"
                for name, value in report.index.items()
            )
        )
    if report.rerank:
        gains = [
            f"{name.removesuffix('_added')} {v:+.4f}" for name, v in report.rerank.items() if name.endswith("_added")
        ]
        lines.append("re-ranking adds: " + ", ".join(gains))
        cost = [f"{name.replace('_', ' ')} {v:.4f}" for name, v in report.rerank.items() if not name.endswith("_added")]
        lines.append("candidates: " + ", ".join(cost))
    return lines
