"""`recray compare`: reports of several runs next to each other, with paired intervals, what differs, and what they cost.

Differences are of the same users, whose sums of every metric the reports keep (recray.evaluation.scores); reports without
them, and metrics that are no means over users, are compared by their intervals alone, which is less sharp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray import storage
from recray.artifacts import in_use, report_stage
from recray.errors import ConfigError
from recray.ids import SPLITS
from recray.layout import SCORES
from recray.lineage import Node, lineage
from recray.metrics import higher_is_better, ranking
from recray.records import CheckpointRecord, DatasetRecord, IndexRecord, Interval, ReportRecord
from recray.report.text import TITLES

_RESAMPLES = 500
_STAGES = ("reranked", "recency", "blended", "index", "model")  # the first of them in a report is what is served


@dataclass(frozen=True)
class Gain:
    """How much better a run is than the first one. Above 0 it is better, also where lower values are."""

    run: str
    metric: str
    gain: float
    low: float | None
    high: float | None
    users: int  # that both know; 0: from the intervals of both, not paired

    @property
    def result(self) -> str:
        if self.low is None or self.high is None:
            return "no interval"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "no clear difference"


@dataclass(frozen=True)
class Compared:
    runs: list[str]  # names, the reference first
    pages: list[str]  # folders of their reports
    systems: list[str]  # what of each is compared
    metrics: dict[str, list[float | None]]  # by metric, in order of runs
    gains: list[Gain]
    configuration: dict[str, list[Any]]  # keys that differ
    cost: dict[str, list[Any]]
    headline: str  # metric of the verdict
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> list[str]:
        """A sentence for each run but the first: the headline, and in how many metrics it is better or worse."""
        said = []
        for run in self.runs[1:]:
            own = [one for one in self.gains if one.run == run and one.low is not None]
            counts = [f"{sum(one.result == word for one in own)} {word}" for word in ("better", "worse")]
            of = f"of {len(own)} metrics with an interval {' and '.join(counts)}"
            main = next((one for one in own if one.metric == self.headline), None)
            if main is None:
                said.append(f"{run} against {self.runs[0]}: {of}")
                continue
            word = main.result if main.result == "no clear difference" else f"{main.result} than {self.runs[0]}"
            interval = f"{main.gain:+.4f} ({main.low:+.4f} to {main.high:+.4f})"
            said.append(f"{run}: {word} in {main.metric}, {interval}; {of}")
        return said

    def as_json(self) -> dict[str, Any]:
        gains = [asdict(one) | {"result": one.result} for one in self.gains]
        return asdict(self) | {"gains": gains, "verdict": self.verdict}


@dataclass(frozen=True)
class _Side:
    name: str
    node: Node
    report: ReportRecord

    @property
    def system(self) -> str:
        return next(one for one in _STAGES if one in self.report.metrics)

    @property
    def values(self) -> dict[str, Interval]:
        return self.report.metrics[self.system]

    def record(self, kind: type[Any]) -> Any:
        """The record of a stage that it was made from; None where that was deleted."""
        return next((one.record for one in self.node.chain() if isinstance(one.record, kind)), None)

    def scores(self) -> pa.Table | None:
        """Each user's share of the metrics; None if the report has none. Raises StorageError if the file is damaged."""
        uri = storage.join(self.node.uri, SCORES)
        if SCORES not in self.report.files or not storage.exists(uri):
            return None
        return storage.read_table(uri, data=self.report.files[SCORES].read(uri))


def compare(uris: Sequence[str], split: str = "test") -> Compared:
    """uris: folders of runs, or of reports. The first one is what the others are compared with.

    Raises LineageError where there is no report, ConfigError for reports of different kinds or splits.
    """
    if len(uris) < 2:
        raise ConfigError("recray compare needs two runs or more: recray compare runs/a runs/b")
    sides = [_side(uri, split) for uri in uris]
    sides = _named_apart(sides)
    kinds = {(one.report.kind, one.report.split) for one in sides}
    if len(kinds) > 1:
        shown = ", ".join(f"{one.name}: {one.report.kind} of {one.report.split}" for one in sides)
        raise ConfigError(f"these reports have no metric in common ({shown}): compare runs of one family on one split")
    names = [name for name in sides[0].values if any(name in one.values for one in sides[1:])]
    cost = [_cost(one) for one in sides]
    return Compared(
        [one.name for one in sides],
        [one.node.uri for one in sides],
        [one.system for one in sides],
        {name: [one.values[name].value if name in one.values else None for one in sides] for name in names},
        [gain for one in sides[1:] for gain in _gains(sides[0], one, names)],
        _differ([_keys(one.node) for one in sides]),
        {name: [one.get(name) for one in cost] for name in dict.fromkeys(key for one in cost for key in one)},
        wanted if (wanted := str(sides[0].report.config["training"]["metric"])) in names else names[0],
        list(_notes(sides)),
    )


def _side(uri: str, split: str) -> _Side:
    node = lineage(in_use(uri.rstrip("/"), report_stage(split)).uri)
    assert isinstance(node.record, ReportRecord)
    return _Side(str(node.record.config["run"]["name"]), node, node.record)


def _named_apart(sides: list[_Side]) -> list[_Side]:
    """Runs of one name are told apart by the identities of their reports."""
    names = [one.name for one in sides]
    return [
        _Side(f"{one.name} {one.report.identity}", one.node, one.report) if names.count(one.name) > 1 else one
        for one in sides
    ]


def _gains(first: _Side, other: _Side, names: Sequence[str]) -> Iterator[Gain]:
    plugins = first.report.config["run"]["plugins"]
    paired = _paired(first, other, names)
    for name in names:
        if name not in other.values:
            continue
        sign = _sign(name, plugins)
        if name in paired:
            mean, low, high, users = paired[name]
            low, high = sorted((sign * low, sign * high))
            yield Gain(other.name, name, sign * mean, low, high, users)
            continue
        a, b = first.values[name], other.values[name]
        gain = sign * (b.value - a.value)
        width = _width(a, b)
        if width is None or not math.isfinite(gain):
            yield Gain(other.name, name, gain, None, None, 0)
        else:
            yield Gain(other.name, name, gain, gain - width, gain + width, 0)


def _sign(metric: str, plugins: str | None) -> int:
    """-1 where lower values are better. Those that describe lists (coverage, gini) have no better direction: +1."""
    try:
        return 1 if higher_is_better(metric, plugins) else -1
    except ConfigError:
        return 1


def _width(a: Interval, b: Interval) -> float | None:
    """Half the 95 % interval of a difference of independent values."""
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return None
    return math.hypot((a.high - a.low) / 2, (b.high - b.low) / 2)


def _paired(first: _Side, other: _Side, names: Sequence[str]) -> dict[str, tuple[float, float, float, int]]:
    """Metric -> mean difference, low, high and number of users, over users with equally many queries in both."""
    a, b = first.scores(), other.scores()
    if a is None or b is None or a["user"].type != b["user"].type:
        return {}
    shared = [n for n in names if f"{first.system}/{n}" in a.column_names and f"{other.system}/{n}" in b.column_names]
    place = pc.index_in(b["user"], a["user"].combine_chunks())
    b, a = b.filter(pc.is_valid(place)), a.take(place.drop_null())
    size = a["size"].to_numpy()
    same = np.isclose(size, b["size"].to_numpy())
    if same.sum() < 2 or not shared:
        return {}
    columns = [b[f"{other.system}/{n}"].to_numpy() - a[f"{first.system}/{n}"].to_numpy() for n in shared]
    sums = np.stack(columns, axis=1).astype(np.float64)[same]
    size = size[same].astype(np.float64)
    low, high = ranking.bootstrap_sums(sums, size, _RESAMPLES, 1)
    means = sums.sum(axis=0) / size.sum()
    found = zip(shared, means.tolist(), low.tolist(), high.tolist(), strict=True)
    return {name: (mean, least, most, int(same.sum())) for name, mean, least, most in found}


def _keys(node: Node) -> dict[str, Any]:
    """Values of the keys that decided a result, over the whole chain."""
    found: dict[str, Any] = {}
    for one in node.chain():
        found |= one.record.keys if one.record is not None else {}
    return found


def _differ(tables: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = sorted({name for one in tables for name in one})
    rows = {name: [one.get(name) for one in tables] for name in names}
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row)}


def _cost(side: _Side) -> dict[str, Any]:
    dataset, model, index = (side.record(kind) for kind in (DatasetRecord, CheckpointRecord, IndexRecord))
    found: dict[str, Any] = {}
    if dataset is not None:
        found |= {"events": sum(dataset.counts[f"events_{name}"] for name in SPLITS), "prepare, s": dataset.seconds}
    if model is not None:
        found |= {"training, s": model.seconds, "epochs trained": len(model.history), "best epoch": model.best_epoch}
        size = sum(one.bytes for name, one in model.files.items() if name.endswith(".safetensors"))
        found["weights, MB"] = size / 1e6
    if index is not None:
        chosen = [one.milliseconds for one in index.curve if one.setting == index.setting]
        found |= {"index, MB": index.bytes / 1e6, "index recall": index.recall}
        found |= {"search, ms per query": chosen[0]} if chosen else {}
    rank = side.report.rerank.get("rank_milliseconds")
    return found | ({"re-rank, ms per query": rank} if rank is not None else {}) | {"evaluate, s": side.report.seconds}


def _notes(sides: Sequence[_Side]) -> Iterator[str]:
    first = sides[0]
    for one in sides[1:]:
        a, b = first.record(DatasetRecord), one.record(DatasetRecord)
        if a is None or b is None or a.id == b.id:
            continue
        what = "logs" if a.fingerprint != b.fingerprint else "preparations of one log"
        yield (
            f"{one.name} and {first.name} are of different {what}: their metrics are of different queries, and differences "
            f"are of users with equally many queries in both"
        )
    if any(one.scores() is None for one in sides):
        yield "some reports keep no figures by user: recray evaluate writes them; differences are not paired"
    systems = {one.system for one in sides}
    if len(systems) > 1:
        yield "compared is what each run serves: " + ", ".join(f"{one.name}: {TITLES[one.system]}" for one in sides)


def render(found: Compared) -> str:
    """As text: metrics, differences from the first run, configuration, cost."""
    lines = [*found.verdict, ""]
    lines += _table("metric", found.runs, {name: [_cell(one) for one in row] for name, row in found.metrics.items()})
    lines += ["", f"differences from {found.runs[0]} (above 0 is better), with 95 % intervals"]
    wide = max((len(one.metric) for one in found.gains), default=0)
    for gain in found.gains:
        interval = f"{gain.low:+.4f} to {gain.high:+.4f}" if gain.low is not None else "-"
        paired = f"paired over {gain.users:,} users" if gain.users else "not paired"
        lines.append(f"  {gain.run}  {gain.metric:{wide}} {gain.gain:+.4f}  {interval:20}  {gain.result:19}  {paired}")
    lines += ["", "configuration" if found.configuration else "configuration: the same"]
    lines += _table("key", found.runs, {name: [str(one) for one in row] for name, row in found.configuration.items()})
    lines += ["", *_table("cost", found.runs, {name: [_cell(one) for one in row] for name, row in found.cost.items()})]
    return "\n".join([*lines, *([""] if found.notes else []), *(f"note: {one}" for one in found.notes)])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if abs(value) >= 1 else f"{value:.4f}"


def _table(head: str, runs: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    if not rows:
        return []
    cells = [[head, *runs], *([name, *row] for name, row in rows.items())]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(
            [f"{row[0]:{widths[0]}}", *(f"{one:>{width}}" for one, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in cells
    ]


def page(found: Compared) -> str:
    """The same as a page."""
    from recray.report import charts, html

    heads = ["", *found.runs]
    text = tuple(range(len(heads)))
    return html.page(
        "compare.html",
        title=" against ".join(found.runs),
        notes=found.notes,
        reports=[html.link(f"{uri}/report.html", name) for name, uri in zip(found.runs, found.pages, strict=True)],
        verdict=found.verdict,
        gains=charts.gains(found.gains, found.runs[0]),
        metrics=html.table(["metric", *found.runs], [[name, *row] for name, row in found.metrics.items()]),
        differences=html.table(
            ["run", "metric", "gain", "low", "high", "users", "result"],
            [[g.run, g.metric, g.gain, g.low, g.high, g.users or "not paired", g.result] for g in found.gains],
            text=(0, 1, 6),
        ),
        configuration=html.table(
            ["key", *found.runs],
            [[name, *map(str, row)] for name, row in found.configuration.items()],
            text=text,
        ),
        cost=html.table(["cost", *found.runs], [[name, *row] for name, row in found.cost.items()]),
    )
