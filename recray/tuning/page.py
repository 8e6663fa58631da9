"""tune.html: a sweep as one file with plots (plotly, its script included) and tables. It loads nothing from a network."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

import numpy as np

from recray.records import Trial, TuneRecord
from recray.report.html import figure, link, page, paragraph, table
from recray.tuning.console import count_statuses
from recray.tuning.importance import unmeasured
from recray.tuning.objective import Objective
from recray.tuning.space import plain, show

_COLOURS = {"done": "#2f80c4", "pruned": "#8c99a6", "failed": "#d1493f", "paused": "#9270d6", "interrupted": "#9270d6"}
_WINNER = "#e07b1a"  # all of them are readable on a light and on a dark page


def render(record: TuneRecord) -> str:
    """The page as HTML. Needs plotly and jinja2."""
    options = record.config["tune"]
    scheduler = "none" if options["search"] == "pbt" else options["scheduler"]
    subtitle = (
        f"{len(record.trials)} trials ({count_statuses(record.trials)}), {record.cpu_hours:.3f} CPU hours including the "
        f"finalists. Search: {options['search']}, scheduler: {scheduler}. All values are validation {record.metric}; the test "
        f"split was not used. The number of a trial links to its folder."
    )
    return page(
        "tune.html",
        title=f"Sweep {record.config['run']['name']}",
        subtitle=subtitle,
        finalists=_finalists(record),
        budget=_budget(record),
        curves=_curves(record),
        keys=list(_keys(record)),
        trials=_trials(record),
    )


def _trace(record: TuneRecord, trial: Trial, x: list[Any], y: list[Any]) -> dict[str, Any]:
    won = trial.number == record.winner
    look = {"color": _WINNER if won else _COLOURS[trial.status]}
    values = "<br>".join(html.escape(f"{key} = {plain(value)}") for key, value in trial.values.items())
    return {
        **{"type": "scatter", "x": x, "y": y, "mode": "lines+markers"},
        "line": {**look, "width": 3 if won else 1.3},
        "marker": {**look, "size": 10 if won else 6},
        "hovertemplate": f"%{{y:.4g}} at %{{x}}<br>trial {trial.number}, {trial.status}<br>{values}<extra></extra>",
    }


def _winner_last(record: TuneRecord) -> list[Trial]:
    """In the order of drawing: important trials on top."""
    return sorted(record.trials, key=lambda trial: (trial.number == record.winner, trial.status == "done"))


def _budget(record: TuneRecord) -> Any:
    total = sum(trial.seconds for trial in record.trials + record.retrained)
    epochs = sorted(  # of all trials, in the order in which they were reported
        (one.at, one.seconds - before, one.value)
        for trial in record.trials
        for before, one in zip([0.0, *(e.seconds for e in trial.curve)], trial.curve, strict=False)
    )
    hours = np.cumsum([seconds for _, seconds, _ in epochs]) * record.cpu_hours / (total or 1)
    best = (np.maximum if record.mode == "max" else np.minimum).accumulate([value for _, _, value in epochs])
    trace = {
        "type": "scatter",
        "mode": "lines",
        "x": hours.tolist(),
        "y": best.tolist(),
        "line": {"shape": "hv", "color": _WINNER, "width": 3},
    }
    caption = f"The search reached {record.metric} {best[-1]:.4f} in {hours[-1]:.3f} CPU hours."
    return figure([trace], caption, "CPU hours", f"best {record.metric}")


def _curves(record: TuneRecord) -> Any:
    traces = [
        _trace(record, trial, [one.epoch for one in trial.curve], [one.value for one in trial.curve])
        for trial in _winner_last(record)
        if trial.curve
    ]
    return figure(traces, f"{record.metric} after every epoch of {len(traces)} trials.", "epoch", record.metric)


def _keys(record: TuneRecord) -> Iterator[Any]:
    """A plot per key, the most important first: its value in every trial against the trial's best value."""
    space, unknown = record.config["tune"]["space"], unmeasured(record.trials)
    for key in dict.fromkeys([*record.importance, *(key for trial in record.trials for key in trial.values)]):
        drawn = [trial for trial in _winner_last(record) if key in trial.values and trial.best is not None]
        numeric = all(type(trial.values[key]) in (int, float) for trial in drawn)
        kind = "category" if not numeric else "log" if space.get(key, {}).get("log") else "linear"
        traces = [
            _trace(record, trial, [value if numeric else html.escape(str(value))], [trial.best])
            for trial in drawn
            for value in [trial.values[key]]
        ]
        why = f", {unknown[key]}" if key in unknown else ""
        importance = f"{record.importance[key]:.0%}" if key in record.importance else f"unknown{why}"
        axis = {"title": {"text": html.escape(key)}, "type": kind, "exponentformat": "e", "nticks": 6}
        yield figure(traces, f"{key}: importance {importance}.", axis, record.metric)


def _finalists(record: TuneRecord) -> Any:
    if not record.finalists:
        return paragraph(
            "None (tune.top = 0). The winner's value is the highest of many on one seed, and therefore too high."
        )
    best = {trial.number: trial.best for trial in record.trials}
    rows = []
    for one in record.finalists:
        seeds = " ".join(f"{seed}: {value:.4f}" for seed, value in zip(one.seeds, one.results, strict=True))
        mean = (f"{one.mean:.4f} ± {one.std:.4f}", one.mean)
        rows.append([_folder(one.number), (plain(best[one.number]), best[one.number]), mean, seeds, show(one.values)])
    text = "The best trials, trained again on seeds that the search did not use. The winner has the best mean."
    heads = ["trial", "search", "other seeds", "each seed", "values"]
    winners = [one.number == record.winner for one in record.finalists]
    return paragraph(text) + table(heads, rows, text=(4,), marked=winners, label="Finalists")


def _trials(record: TuneRecord) -> Any:
    ranked = Objective(record.metric, record.mode).ranked(record.trials)
    trials = [*ranked, *(trial for trial in record.trials if trial.best is None)]
    rows = []
    for trial in trials:
        values = show(trial.values) + (f": {trial.reason}" if trial.reason else "")
        best = ("" if trial.best is None else plain(trial.best), trial.best)
        seconds = (f"{trial.seconds:.1f}", trial.seconds)
        rows.append([_folder(trial.number), trial.status, trial.epochs, seconds, best, values])
    heads = ["trial", "status", "epochs", "seconds", record.metric, "values"]
    winners = [trial.number == record.winner for trial in trials]
    return table(heads, rows, text=(1, 5), marked=winners, label="All trials")


def _folder(number: int) -> tuple[Any, int]:
    """A link from tune.html to the folder of a trial."""
    return link(f"trials/{number:04d}/", str(number)), number
