"""The plots of a report, each with a caption that says what it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recray.records import CheckpointRecord, IndexRecord, Interval, ReportRecord, Slice
from recray.report.html import COLOURS, SYMBOLS, figure, paragraph
from recray.report.text import TITLES

if TYPE_CHECKING:
    from recray.report.compare import Gain

_WIDTH = 20  # characters of a label before it is broken


def look_of(systems: Sequence[str]) -> dict[str, tuple[str, str]]:
    """System -> colour and symbol, the same in every plot of a page."""
    return {name: (COLOURS[i % len(COLOURS)], SYMBOLS[i % len(SYMBOLS)]) for i, name in enumerate(systems)}


def title_of(system: str, report: ReportRecord | None = None) -> str:
    """report: that of a ranker has one model and no search."""
    if system == "model" and report is not None and report.kind == "clicks":
        return "model"
    return TITLES.get(system, system)


def headline(report: ReportRecord, metric: str) -> Any:
    """Each system's value with its interval, the best on top."""
    looks = look_of(list(report.metrics))
    found = [(name, one[metric]) for name, one in report.metrics.items() if metric in one]
    found.sort(key=lambda pair: pair[1].value)
    traces = []
    for name, one in found:
        colour, symbol = looks[name]
        error = _error([one])
        traces.append(
            {
                **{"type": "scatter", "mode": "markers", "x": [one.value], "y": [_broken(title_of(name, report))]},
                **{
                    "marker": {"color": colour, "size": 11, "symbol": symbol},
                    "hovertemplate": "%{x:.4f}<extra></extra>",
                },
                **({"error_x": error | {"color": colour}} if error else {}),
            }
        )
    caption = f"{metric} of every system; bars are 95 % intervals over users. " + "; ".join(
        f"{title_of(name, report)} {one.value:.4f}" for name, one in reversed(found)
    )
    shape = {"title": {"text": f"{metric} on the {report.split} split"}, "rangemode": "tozero", "nticks": 5}
    return figure(traces, caption + ".", shape, {"title": {"text": ""}}, height=90 + 42 * len(found))


def _broken(text: str) -> str:
    """In lines of about _WIDTH characters."""
    lines = [""]
    for word in text.split():
        lines = [*lines, word] if len(lines[-1]) + len(word) > _WIDTH else [*lines[:-1], f"{lines[-1]} {word}".strip()]
    return "<br>".join(lines)


def _error(values: Sequence[Interval]) -> dict[str, Any] | None:
    if any(one.low is None or one.high is None for one in values):
        return None
    return {
        **{"type": "data", "symmetric": False, "thickness": 2},
        "array": [(one.high or 0.0) - one.value for one in values],
        "arrayminus": [one.value - (one.low or 0.0) for one in values],
    }


def curves(model: CheckpointRecord) -> list[Any]:
    """Validation metric and training loss by epoch."""
    plots, best = [], model.best_epoch
    for key, colour in ((model.metric, COLOURS[0]), ("loss", COLOURS[1])):
        entries = [entry for entry in model.history if key in entry]
        if not entries:
            continue
        x, y = [int(entry["epoch"]) for entry in entries], [entry[key] for entry in entries]
        what = f"validation {key}" if key == model.metric else "training loss"
        if len(entries) == 1:  # a point has no curve, and its axes would say nothing
            plots.append(paragraph(f"{what} {y[0]:.4f} after epoch {x[0]}, the only one."))
            continue
        traces = [line(x, y, what, colour, "circle")]
        chosen = f" Epoch {best} was chosen." if best in x and key == model.metric else ""
        if chosen:
            traces.append(line([best], [y[x.index(best)]], "chosen", COLOURS[4], "diamond", 13))
        plots.append(
            figure(
                traces,
                f"{what} from {y[0]:.4f} after epoch {x[0]} to {y[-1]:.4f} after epoch {x[-1]}.{chosen}",
                {"title": {"text": "epoch"}, "dtick": max(1, len(model.history) // 8)},
                what,
                height=280,
            )
        )
    return plots


def line(x: Sequence[Any], y: Sequence[Any], name: str, colour: str, symbol: str, size: int = 8) -> dict[str, Any]:
    return {
        **{"type": "scatter", "mode": "lines+markers", "x": list(x), "y": list(y)},
        **{"line": {"color": colour, "width": 2}, "marker": {"color": colour, "size": size, "symbol": symbol}},
        "hovertemplate": f"{name}: %{{y:.4g}} at %{{x}}<extra></extra>",
    }


def by_k(report: ReportRecord) -> list[Any]:
    """Recall and NDCG by the length of the list."""
    ks = sorted({int(name.split("@")[1]) for name in report.metrics["model"]})
    looks, plots = look_of(list(report.metrics)), []
    for metric in ("recall", "ndcg") if len(ks) > 1 else ():
        traces = [
            line(ks, [values[f"{metric}@{k}"].value for k in ks], title_of(name), *looks[name])
            for name, values in report.metrics.items()
        ]
        legend = [(title_of(name), looks[name][0]) for name in report.metrics]
        model = report.metrics["model"]
        caption = f"{metric} by the length of the list; the model has " + ", ".join(
            f"{model[f'{metric}@{k}'].value:.4f} at {k}" for k in ks
        )
        axis = {"title": {"text": "K, items in the list"}, "tickvals": ks}
        plots.append(
            figure(traces, caption + ".", axis, {"title": {"text": metric}, "rangemode": "tozero"}, 280, legend)
        )
    return plots


def sliced(report: ReportRecord, slices: Sequence[Slice], what: str, systems: Sequence[str]) -> Any:
    """A metric of some systems over the groups of one kind."""
    looks, metric = look_of(list(report.metrics)), slices[0].metric
    x = [one.group for one in slices]
    traces = []
    for name in systems:
        values = [one.values[name] for one in slices]
        trace = line(x, [one.value for one in values], title_of(name, report), *looks[name])
        error = _error(values)
        traces.append({**trace, **({"error_y": error | {"color": looks[name][0], "thickness": 1.2}} if error else {})})
    caption = f"{metric} by {what}, with 95 % intervals over users."
    return figure(
        traces,
        caption,
        {"title": {"text": what}, "type": "category", "tickangle": -30 if len(x) > 4 else 0},
        {"title": {"text": metric}, "rangemode": "tozero"},
        340,
        [(title_of(name, report), looks[name][0]) for name in systems],
    )


def calibration(report: ReportRecord) -> Any:
    """Observed share of clicks by predicted probability."""
    x, y = [one.predicted for one in report.reliability], [one.observed for one in report.reliability]
    high = max([*x, *y])
    ideal = {
        **{"type": "scatter", "mode": "lines", "x": [0, high], "y": [0, high], "hoverinfo": "skip"},
        "line": {"color": COLOURS[5], "dash": "dash"},
    }
    error = report.metrics["model"].get("ece")
    known = f" The mean distance from it is {error.value:.4f} (ece)." if error is not None else ""
    caption = (
        "Share of clicks among impressions of about the same predicted probability. On the dashed line predictions are "
        f"right; below it clicks are rarer than predicted.{known}"
    )
    return figure(
        [ideal, line(x, y, "observed", COLOURS[0], "circle")],
        caption,
        "predicted probability of a click",
        "observed share of clicks",
    )


def index_curve(index: IndexRecord) -> Any:
    """Recall against time of every setting that was tried; the chosen one marked."""
    curve = sorted(index.curve, key=lambda one: one.milliseconds)
    names = [", ".join(f"{key} = {value}" for key, value in one.setting.items()) or "exact" for one in curve]
    trace = line([one.milliseconds for one in curve], [one.recall for one in curve], "recall", COLOURS[0], "circle")
    trace |= {"text": names, "hovertemplate": "%{text}: recall %{y:.4f} in %{x:.3f} ms<extra></extra>"}
    chosen = [one for one in curve if one.setting == index.setting]
    marks = [line([one.milliseconds], [one.recall], "chosen", COLOURS[4], "diamond", 14) for one in chosen]
    target = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": index.recall_target, "y1": index.recall_target}
    setting = ", ".join(f"{key} = {value}" for key, value in index.setting.items()) or "no setting"
    caption = (
        f"Recall@{index.k} against exact search by time per query; dashed: the target {index.recall_target}. Chosen: "
        f"{index.factory} with {setting}, recall {index.recall:.4f}, measured on other queries."
    )
    return figure(
        [trace, *marks],
        caption,
        {"title": {"text": "milliseconds per query"}, "rangemode": "tozero"},
        f"recall@{index.k}",
        shapes=[target | {"line": {"color": COLOURS[1], "dash": "dash", "width": 1.5}}],
    )


def gains(found: Sequence[Gain], first: str) -> Any:
    """Differences from the first run with their intervals, by metric; runs are told apart by colour and symbol."""
    looks = look_of(list(dict.fromkeys(one.run for one in found)))
    ranked = [one for one in found if "@" in one.metric and one.low is not None] or list(found)
    traces = []
    for run, (colour, symbol) in looks.items():
        own = [one for one in ranked if one.run == run][::-1]
        error = _error([Interval(value=one.gain, low=one.low, high=one.high) for one in own])
        traces.append(
            {
                **{
                    "type": "scatter",
                    "mode": "markers",
                    "x": [one.gain for one in own],
                    "y": [one.metric for one in own],
                },
                **{"marker": {"color": colour, "size": 9, "symbol": symbol}},
                "hovertemplate": f"{run}: %{{x:+.4f}}<extra></extra>",
                **({"error_x": error | {"color": colour}} if error else {}),
            }
        )
    caption = f"Gain over {first} by metric, with 95 % intervals; right of the line is better."
    height = 110 + 30 * len({one.metric for one in ranked})
    line = {
        "type": "line",
        "yref": "paper",
        "x0": 0,
        "x1": 0,
        "y0": 0,
        "y1": 1,
        "line": {"color": COLOURS[5], "width": 1.5},
    }
    legend = [(run, look[0]) for run, look in looks.items()]
    return figure(traces, caption, f"gain over {first}", "", height, legend, shapes=[line])


def bars(values: Mapping[str, float], caption: str, axis: str, unit: str = "") -> Any:
    """Horizontal bars with their values."""
    names = [_broken(name) for name in list(values)[::-1]]
    numbers = list(values.values())[::-1]
    text = [f"{value:,.0f}{unit}" if value >= 100 else f"{value:,.1f}{unit}" for value in numbers]
    trace = {
        **{"type": "bar", "orientation": "h", "x": numbers, "y": names, "text": text, "textposition": "outside"},
        **{"marker": {"color": COLOURS[0]}, "hovertemplate": "%{y}: %{x:,.1f}<extra></extra>", "cliponaxis": False},
        "textfont": {"size": 12},
    }
    shape = {"title": {"text": axis}, "range": [0, 1.18 * max([*numbers, 1e-9])], "nticks": 6}
    return figure([trace], caption, shape, "", height=100 + 34 * len(names))


def epochs(model: CheckpointRecord) -> Any:
    """Seconds of each epoch by what they went to."""
    parts: dict[str, list[float]] = {
        "computing steps": [max(e["seconds"] * (1 - e.get("waiting_share", 0.0)), 0.0) for e in model.history],
        "waiting for batches": [e["seconds"] * e.get("waiting_share", 0.0) for e in model.history],
        "validation": [e.get("validation_seconds", 0.0) for e in model.history],
        "saving": [e.get("saving_seconds", 0.0) for e in model.history],
    }
    x = [int(entry["epoch"]) for entry in model.history]
    traces = [
        {
            **{"type": "bar", "x": x, "y": seconds, "marker": {"color": COLOURS[i]}},
            "hovertemplate": f"{name}: %{{y:.1f}} s in epoch %{{x}}<extra></extra>",
        }
        for i, (name, seconds) in enumerate(parts.items())
    ]
    totals = ", ".join(f"{name} {sum(seconds):,.1f} s" for name, seconds in parts.items())
    axis = {"title": {"text": "epoch"}, "dtick": max(1, len(x) // 8)}
    legend = [(name, COLOURS[i]) for i, name in enumerate(parts)]
    return figure(traces, f"Over all epochs: {totals}.", axis, "seconds", 300, legend, barmode="stack")
