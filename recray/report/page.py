"""report.html: a report as one page, from the records of the run alone (and titles from its item table)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from recray import log, storage
from recray.artifacts import flatten
from recray.config import Config, with_values
from recray.errors import LineageError, RecrayError
from recray.ids import NUM_RESERVED, SPLITS
from recray.lineage import Node, lineage
from recray.records import CheckpointRecord, DatasetRecord, Example, IndexRecord, ReportRecord, Slice
from recray.report import charts, html, titles
from recray.report.charts import title_of
from recray.report.verdict import result, shares
from recray.training.console import ADVICE

FILE = "report.html"
_SLICES = {
    "history": "events known of the user",
    "popularity": "training events of the item",
    "age": "time since the item was first chosen",
}
_ADVICE = "try next: "
_FEW = 30  # queries or impressions of a group, below which nothing is said of it


def write(folder: str, title: str | None = None) -> str | None:
    """Write the page of the report in a folder next to it. Returns its location; None where plotly or jinja2 is missing.

    title: column of the item table that names items, instead of report.title.
    """
    if not html.available("evaluate", FILE):
        return None
    uri = storage.join(folder, FILE)
    storage.write_bytes(uri, render(folder, title).encode())
    log.info("evaluate", f"page: {uri}", event="page", values={"uri": uri})
    return uri


def render(folder: str, title: str | None = None) -> str:
    """The page of the report in a folder, as HTML. Raises LineageError if its model or dataset has been deleted."""
    return _Page(lineage(folder), title).html()


class _Page:
    """What the page is made of."""

    def __init__(self, node: Node, title: str | None) -> None:
        assert isinstance(node.record, ReportRecord)
        self.node, self.report = node, node.record
        by_id = {one.id: one.record for one in node.chain()}
        model = by_id.get(self.report.parents[0])
        dataset = next((one for one in by_id.values() if isinstance(one, DatasetRecord)), None)
        if not isinstance(model, CheckpointRecord) or dataset is None:
            raise LineageError(
                f"{node.uri}: its model or its dataset has been deleted, so that no page can be made of it"
            )
        self.model, self.dataset = model, dataset
        self.index = next((one for one in by_id.values() if isinstance(one, IndexRecord)), None)
        self.config = Config.model_validate(self.report.config)
        if title is not None:
            self.config = with_values(self.config, {"report.title": title})
        compared = next(iter(self.report.comparisons), None)
        model_metrics = self.report.metrics["model"]
        wanted = self.config.training.metric
        self.metric = compared.metric if compared else wanted if wanted in model_metrics else next(iter(model_metrics))
        runs = [name for name in ("reranked", "recency", "blended", "index", "model") if name in self.report.metrics]
        self.final = runs[0]
        self.baselines = [name for name in self.report.metrics if name not in runs]

    def html(self) -> str:
        report, config = self.report, self.config
        kind = "click predictions" if report.kind == "clicks" else "recommendation lists"
        advice = [one.removeprefix(_ADVICE) for one in report.verdict if one.startswith(_ADVICE)]
        named = titles.of_items(config, [one.model_dump() for one in report.examples])
        return html.page(
            "report.html",
            title=f"{config.run.name}: {config.model.name} on the {report.split} split",
            subtitle=f"{kind.capitalize()} of {report.counts['users']:,} users, evaluated {report.created[:16].replace('T', ' ')} "
            f"UTC with recray {report.recray_version}.",
            cards=list(self._cards()),
            verdict=[one for one in report.verdict if not one.startswith(_ADVICE)],
            weak=list(self._weak()),
            advice=advice,
            headline=charts.headline(report, self.metric),
            sections=list(self._sections()),
            examples=[self._example(one, named) for one in report.examples],
            examples_note=self._examples_note(),
            last_sections=list(self._origin()),
        )

    # ---- first screen

    def _cards(self) -> Iterator[dict[str, str]]:
        report = self.report
        value = report.metrics[self.final][self.metric]
        note = f"{title_of(self.final, report)}" + (
            f", 95 % interval {value.low:.4f} to {value.high:.4f}"
            if value.low is not None and value.high is not None
            else ""
        )
        yield {"title": self.metric, "value": f"{value.value:.4f}", "note": note, "look": ""}
        for one in report.comparisons:
            if one.system == "model" and one.other in ("popularity", self._best_baseline()):
                word = result(one) or "no clear difference"
                yield {
                    "title": f"against {title_of(one.other)}",
                    "value": f"{one.gain:+.4f}",
                    "note": f"{word} in {self.metric}, paired over users",
                    "look": result(one),
                }
        if report.kind == "lists":
            unknown, seen, new = shares(report, self.config)
            note = f"{unknown:.1%} unknown items, {seen:.1%} chosen before; {new:.1%} of all are of users without a history"
            yield {"title": "targets that can be hit", "value": f"{1 - unknown - seen:.1%}", "note": note, "look": ""}
        else:
            share = report.counts["clicks"] / max(report.counts["impressions"], 1)
            note = f"{report.counts['clicks']:,} of {report.counts['impressions']:,}"
            yield {"title": "impressions with a click", "value": f"{share:.1%}", "note": note, "look": ""}

    def _best_baseline(self) -> str | None:
        """The best one that could be used in practice."""
        real = [name for name in self.baselines if name not in ("oracle", "hindsight")]
        values = {n: self.report.metrics[n][self.metric].value for n in real if self.metric in self.report.metrics[n]}
        return max(values, key=lambda name: values[name], default=None)

    def _weak(self) -> Iterator[str]:
        """Groups of users for whom the model is not clearly better than popularity, and than the best baseline."""
        for other in dict.fromkeys(("popularity", self._best_baseline())):
            known = [one for one in self.report.slices if one.by == "history" and one.size >= _FEW]
            groups = [one for one in known if other in one.gains]
            if other is None or not groups:
                continue
            not_better = [one for one in groups if not (one.gains[other].low or 0.0) > 0]
            worse = [one for one in not_better if (high := one.gains[other].high) is not None and high < 0]
            for word, found in (("better", groups if not not_better else []), ("worse", worse)):
                if found and len(found) == len(groups):
                    yield f"{word} than {title_of(other)} in every group by the length of the history"
            if len(worse) == len(groups):
                continue
            for one in not_better:
                word = "worse" if one in worse else "not clearly better"
                yield (
                    f"{word} than {title_of(other)} for users with {one.group} known events ({one.size:,} "
                    f"{'queries' if self.report.kind == 'lists' else 'impressions'}): {one.metric} {_gain(one, other)}"
                )

    # ---- sections

    def _sections(self) -> Iterator[dict[str, Any]]:
        report = self.report
        yield _section("metrics", "All metrics", [*self._metrics()])
        for by in dict.fromkeys([*_SLICES, *(one.by for one in report.slices)]):
            slices, what = [one for one in report.slices if one.by == by], _SLICES.get(by, by)
            if slices:
                of = "targets" if "found@" in slices[0].metric else "queries"
                of = of if report.kind == "lists" else "impressions"
                yield _section("-".join(["by", *by.split()]), f"By {what}", [*self._slices(slices, what, of)])
        if report.reliability:
            yield _section("calibration", "Calibration", [charts.calibration(report), self._reliability()])
        if self.model.history:
            yield _section("training", "Training", [html.grid(charts.curves(self.model)), *self._training()])
        if self.index is not None:
            yield _section("index", "Index: recall against time", [charts.index_curve(self.index), self._index_table()])
        yield _section("time", "Where time went", [*self._time()])

    def _metrics(self) -> Iterator[Any]:
        report = self.report
        if report.kind == "lists":
            yield html.grid(charts.by_k(report))
        names = list(report.metrics["model"])
        rows = [
            [title_of(name, report), *(one[n].value if n in one else None for n in names)]
            for name, one in report.metrics.items()
        ]
        if report.reachable:
            rows.append(["all targets that can be hit", *(report.reachable.get(n) for n in names)])
        yield html.table(["system", *names], rows, label="All metrics of every system")
        if report.new_users:
            yield html.paragraph("Of the queries of users without a history, which are not in the table above:")
            new = [[title_of(name), *one.values()] for name, one in report.new_users.items()]
            yield html.table(["system", *next(iter(report.new_users.values()))], new, label="New users")
        compared = [
            [
                title_of(c.system, report),
                title_of(c.other),
                c.metric,
                c.gain,
                c.low,
                c.high,
                result(c) or "no clear difference",
            ]
            for c in report.comparisons
        ]
        if compared:
            yield html.paragraph("Differences on the same queries, with 95 % intervals over users; above 0 is better.")
            heads = ["system", "against", "metric", "difference", "low", "high", "result"]
            yield html.table(heads, compared, text=(0, 1, 2, 6), label="Differences between systems")

    def _slices(self, slices: list[Slice], what: str, of: str) -> Iterator[Any]:
        best = self._best_baseline()
        shown = [name for name in dict.fromkeys(("model", self.final, "popularity", best)) if name in slices[0].values]
        yield charts.sliced(self.report, slices, what, shown)
        if slices[0].metric.startswith("found@"):
            k = slices[0].metric.removeprefix("found@")
            yield html.paragraph(f"found@{k}: the share of targets that are among the first {k} items of a list.")
        systems = list(slices[0].values)
        others = [name for name in dict.fromkeys(("popularity", best)) if name in slices[0].gains]
        heads = [what, of, *(title_of(s, self.report) for s in systems), *(f"model - {title_of(o)}" for o in others)]
        rows = [
            [
                (one.group, number),
                one.size,
                *(one.values[s].value for s in systems),
                *((_gain(one, o), one.gains[o].value) for o in others),
            ]
            for number, one in enumerate(slices)
        ]
        yield html.table(heads, rows, label=f"{slices[0].metric} by {what}")

    def _reliability(self) -> Any:
        rows = [[one.predicted, one.observed, one.impressions] for one in self.report.reliability]
        return html.table(["predicted", "observed", "impressions"], rows, text=(), label="Calibration")

    def _training(self) -> Iterator[Any]:
        model = self.model
        heads = ["epoch", "loss", model.metric, "seconds", "events per second", "waiting"]
        rows = [
            [
                int(entry["epoch"]),
                entry.get("loss"),
                entry.get(model.metric),
                (f"{entry['seconds']:.1f}", entry["seconds"]),
                (f"{entry.get('events_per_second', 0.0):,.0f}", entry.get("events_per_second")),
                (f"{entry.get('waiting_share', 0.0):.0%}", entry.get("waiting_share")),
            ]
            for entry in model.history
        ]
        yield html.table(
            heads,
            rows,
            text=(),
            marked=[row[0] == model.best_epoch for row in rows],
            label="Epochs; the chosen one is marked",
        )

    def _index_table(self) -> Any:
        assert self.index is not None
        rows = [
            [
                ", ".join(f"{k} = {v}" for k, v in one.setting.items()) or "exact",
                one.recall,
                one.recall_at_10,
                one.milliseconds,
            ]
            for one in self.index.curve
        ]
        chosen = [one.setting == self.index.setting for one in self.index.curve]
        heads = ["setting", f"recall@{self.index.k}", "recall@10", "milliseconds per query"]
        return html.table(heads, rows, marked=chosen, label="Settings of the index; the chosen one is marked")

    def _time(self) -> Iterator[Any]:
        stages = {"prepare": self.dataset.seconds, "train": self.model.seconds}
        stages |= {"index": self.index.seconds} if self.index else {}
        stages["evaluate"] = self.report.seconds
        longest = max(stages, key=lambda name: stages[name])
        caption = (
            "Seconds of each stage: " + ", ".join(f"{name} {value:,.1f} s" for name, value in stages.items()) + "."
        )
        plots = [charts.bars(stages, caption, "seconds", " s")]
        plots += [charts.epochs(self.model)] if self.model.history else []
        yield html.grid(plots)
        yield html.paragraph(f"The longest stage is {longest}. {self._time_advice()}")

    def _time_advice(self) -> str:
        """What to set, from what was measured in training."""
        history = self.model.history
        seconds = sum(entry["seconds"] for entry in history)
        if not seconds:
            return ""
        waited = sum(entry["seconds"] * entry.get("waiting_share", 0.0) for entry in history) / seconds
        loader = {name: sum(entry.get(f"{name}_seconds", 0.0) for entry in history) for name in ADVICE}
        took = ", ".join(f"{name} {value:.1f} s" for name, value in loader.items())
        text = f"Training waited {waited:.0%} of its time for batches; the loader, which works ahead, took {took}."
        if waited > 0.1:
            slowest = max(loader, key=lambda name: loader[name])
            return f"{text} To wait less: {ADVICE[slowest]}."
        validation = sum(entry.get("validation_seconds", 0.0) for entry in history)
        if validation > 0.5 * seconds:
            return f"{text} Validation took {validation:.1f} s: a higher training.validate_every saves most of it."
        return f"{text} Steps are the limit: scaling.num_workers, a GPU (scaling.use_gpu) or a smaller model.dim make them faster."

    # ---- examples

    def _examples_note(self) -> str:
        hits = sum(one.hit for one in self.report.examples)
        return (
            f"{hits} users whose list of the model has a hit and {len(self.report.examples) - hits} whose list has none, from the "
            f"first queries of the split; they are no random sample. Hits are marked."
        )

    def _example(self, one: Example, named: Mapping[str, str]) -> dict[str, Any]:
        targets = set(one.targets) - {""}

        def name(key: str) -> str:
            return named.get(key, key) if key else "an unknown item"

        lists = {
            title_of(system): [{"name": name(key), "hit": key in targets} for key in keys]
            for system, keys in one.lists.items()
        }
        shown = [name(key) for key in one.targets[:10]]
        more = [f"{len(one.targets) - 10} more"] if len(one.targets) > 10 else []
        history = [name(key) for key in one.history]
        return {"user": one.user, "events": one.events, "history": history, "targets": shown + more, "lists": lists}

    # ---- where it comes from

    def _origin(self) -> Iterator[dict[str, Any]]:
        yield _section("data", "Data", [*self._data()])
        rows = [
            [one.record.file_name().removesuffix(".json") if one.record else "missing", one.id, *_made(one), one.uri]
            for one in self.node.chain()
        ]
        heads = ["record", "id", "created (UTC)", "code", "folder"]
        inputs = [[file.uri, file.bytes, file.known_by, file.state[:16]] for file in self.dataset.inputs]
        files = [html.table(["input file", "bytes", "known by", "state"], inputs, text=(0, 2, 3), label="Input files")]
        more = [html.details(f"{len(inputs):,} input files", files)] if inputs else []
        parts = [html.table(heads, rows, text=(0, 1, 2, 3, 4), label="Lineage"), *more]
        yield _section("lineage", "Lineage", parts)
        yield _section("configuration", "Configuration", [*self._configuration()])

    def _data(self) -> Iterator[Any]:
        counts, record = self.dataset.counts, self.dataset
        events = {name: float(counts[f"events_{name}"]) for name in SPLITS}
        caption = "Events of each split: " + ", ".join(f"{name} {count:,.0f}" for name, count in events.items()) + "."
        yield charts.bars(events, caption, "events")
        rows: list[list[Any]] = [
            ["items", record.num_items - NUM_RESERVED, "in the training split: the catalogue"],
            ["items only in validation", record.new_items, "known to a refit only"],
            ["users", record.num_users - NUM_RESERVED, ""],
        ]
        rows += [[name.replace("_", " "), value, ""] for name, value in counts.items()]
        rows += [
            [f"{name.replace('_', ' ')}", (_time(value), value), "UTC"]
            for name, value in record.split.items()
            if isinstance(value, int) and record.has_time
        ]
        rows += [
            [f"feature {one.role} {one.name}", one.cardinality or None, f"{one.kind}, embedding rows"]
            for one in record.features
        ]
        yield html.table(["what", "value", "note"], rows, text=(0, 2), label="Counts of the dataset")

    def _configuration(self) -> Iterator[Any]:
        values, defaults = flatten(self.report.config), _defaults(self.report.config)
        rows = [[key, str(value), str(defaults.get(key, "-"))] for key, value in values.items()]
        differs = [row for row in rows if row[1] != row[2]]
        heads = ["key", "value", "default"]
        yield html.paragraph(f"{len(differs)} keys differ from their defaults.")
        yield html.table(heads, differs, text=(0, 1, 2), label="Keys that differ from their defaults")
        yield html.details(f"All {len(rows)} keys", [html.table(heads, rows, text=(0, 1, 2), label="All keys")])


def _section(id_: str, title: str, parts: list[Any]) -> dict[str, Any]:
    return {"id": id_, "title": title, "parts": parts}


def _gain(one: Slice, other: str) -> str:
    gain = one.gains[other]
    if gain.low is None or gain.high is None:
        return f"{gain.value:+.4f}"
    return f"{gain.value:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})"


def _made(node: Node) -> tuple[str, str]:
    if node.record is None:
        return "", ""
    git = node.record.made_by.project or node.record.made_by.package
    commit = f" at {git.commit[:8]}{'+' * git.dirty}" if git is not None else ""
    return node.record.created[:16].replace("T", " "), f"recray {node.record.recray_version}{commit}"


def _time(microseconds: int) -> str:
    return datetime.fromtimestamp(microseconds / 1e6, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the same model, loss and source with their defaults; empty where a plug-in does not stand alone."""
    run = {"name": config["run"]["name"], "plugins": config["run"]["plugins"]}
    body = {"run": run, **{section: {"name": config[section]["name"]} for section in ("model", "loss")}}
    try:
        default = Config.model_validate(body | {"data": {"source": config["data"]["source"]}})
    except (RecrayError, ValueError):
        return {}
    return flatten(default.model_dump(mode="json")) | {"run.name": "-", "model.name": "two_tower"}
