"""The report as plain text, at most 100 columns wide: one row per recommender, one column per metric."""

from __future__ import annotations

from recray.metrics.ranking import METRICS as LIST_METRICS
from recray.records import Interval, ReportRecord

_TITLES = {
    "model": "model (exact search)",
    "index": "model (index)",
    "blended": "model + item-item baseline",
    "reranked": "reranked",
    "popularity": "popularity",
    "recent_popularity": "recent popularity",
    "hindsight": "popularity of the split",
    "item_knn": "item-item baseline",
    "oracle": "oracle (upper bound)",
}
_BEYOND = ("coverage", "gini", "arp", "novelty", "ild")  # one value for all lists, without intervals


def render(report: ReportRecord) -> str:
    """The report of a retriever or of a ranker as lines of text."""
    return _clicks(report) if report.kind == "clicks" else _lists(report)


def _clicks(report: ReportRecord) -> str:
    """The table of metrics, then predicted against observed click rates."""
    counts, model = report.counts, report.metrics["model"]
    heads = {"normalized_entropy": "norm.entropy", "gauc_impressions": "gauc_impr"}
    lines = [
        f"{report.split} split: {counts['impressions']:,} impressions, {counts['clicks']:,} clicks, {counts['users']:,} users",
        "",
        f"{'':27}" + "".join(f"{heads.get(name, name):>13}" for name in model),
    ]
    for row, values in report.metrics.items():
        cells = (f"{values[name].value:13.4f}" if name in values else f"{'-':>13}" for name in model)
        lines.append(f"{row:27}" + "".join(cells))
    if model["auc"].low is not None:
        lines.append(f"{'  model, 95 % interval +-':27}" + "".join(f"{_half(one):13.4f}" for one in model.values()))
    lines += ["", "reliability      predicted     observed  impressions"]
    lines += [f"{'':13}{one.predicted:13.4f}{one.observed:13.4f}{one.impressions:13,}" for one in report.reliability]
    lines += ["", f"{counts['unknown_items'] / counts['impressions']:.1%} of the impressions are of unknown items"]
    return "\n".join(lines)


def _lists(report: ReportRecord) -> str:
    """A table for each K, then counts and what the index loses."""
    ks = sorted({int(name.split("@")[1]) for name in report.metrics["model"]})
    lines = [
        f"{report.split} split, full ranking over {report.counts['catalogue']:,} items, {report.counts['queries']:,} queries"
    ]
    for k in ks:
        lines += _table(report, [f"{name}@{k}" for name in ("recall", "hr", "ndcg", "mrr", "map")])
    lines += _table(report, [f"{name}@{ks[-1]}" for name in _BEYOND])
    if own := [name for name in report.metrics["model"] if name.partition("@")[0] not in (*LIST_METRICS, *_BEYOND)]:
        lines += _table(report, own)
    lines += ["", *_learned(report, f"ndcg@{ks[0]}"), *_counts(report)]
    return "\n".join(lines)


def _table(report: ReportRecord, names: list[str]) -> list[str]:
    """These metrics of every recommender, and the half width of the model's intervals."""
    lines = ["", f"{'':27}" + "".join(f"{name:>13}" for name in names)]
    for row, values in report.metrics.items():
        lines.append(f"{_TITLES.get(row, row):27}" + "".join(f"{values[n].value:13.4f}" for n in names))
    model = report.metrics["model"]
    if model[names[0]].low is not None:
        lines.append(f"{'  model, 95 % interval +-':27}" + "".join(f"{_half(model[n]):13.4f}" for n in names))
    return lines


def _half(interval: Interval) -> float:
    return ((interval.high or 0.0) - (interval.low or 0.0)) / 2


def _learned(report: ReportRecord, name: str) -> list[str]:
    """Where the model lies between popularity and the oracle."""
    if "oracle" not in report.metrics or "popularity" not in report.metrics:
        return []
    low, model, high = (report.metrics[one][name].value for one in ("popularity", "model", "oracle"))
    share = (model - low) / (high - low) if high > low else float("nan")
    return [
        f"{name}: popularity {low:.4f} <= model {model:.4f} <= oracle {high:.4f}: {share:.0%} of what can be learned"
    ]


def _counts(report: ReportRecord) -> list[str]:
    counts = report.counts
    unknown = counts["unknown_targets"] / max(counts["targets"], 1)
    lines = [
        f"dropped: {counts['queries_without_history']:,} queries without a history; {unknown:.1%} of {counts['targets']:,} targets are "
        f"unknown items (misses); {counts['short_lists']:,} short lists"
    ]
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
