"""tune.html: a sweep as one file with plots (plotly, its script included) and tables. It loads nothing from a network."""

from __future__ import annotations

import html
from typing import Any

import numpy as np

from recray.records import Trial, TuneRecord
from recray.tuning.console import count_statuses
from recray.tuning.importance import unmeasured
from recray.tuning.objective import Objective
from recray.tuning.space import plain, show

_STYLE = """
:root { color-scheme: light dark; --text: #1c2733; --muted: #51606f; --line: #dde3e9; --mark: #fff1dc; --page: #fff }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e9ee; --muted: #a9b4bf; --line: #36414c; --mark: #43331b; --page: #14191f } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1000px; padding: 1rem; color: var(--text); background: var(--page) }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem } p, figcaption { color: var(--muted); margin: .3rem 0 }
figure { margin: 0; min-width: 0 } .keys { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 1rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: 13px }
td, th { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
td:last-child, th:last-child { text-align: left } tr.winner { background: var(--mark); font-weight: 600 }
.xtick text, .ytick text, .xtitle, .ytitle { fill: var(--muted) !important } .gridlayer path, .zerolinelayer path { stroke: var(--line) !important }
"""
_COLOURS = {"done": "#2f80c4", "pruned": "#8c99a6", "failed": "#d1493f", "paused": "#9270d6", "interrupted": "#9270d6"}
_WINNER = "#e07b1a"  # all of them are readable on a light and on a dark page
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_LAYOUT = {
    **{"height": 320, "showlegend": False, "margin": {"l": 10, "r": 10, "t": 10, "b": 10}},
    **{"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)"},
    "hoverlabel": {"bgcolor": "#1c2733", "font": {"color": "#fff"}},
}


def render(record: TuneRecord) -> str:
    """The page as HTML. Needs plotly."""
    from plotly.offline import get_plotlyjs

    title, options = html.escape(f"Sweep {record.config['run']['name']}"), record.config["tune"]
    scheduler = "none" if options["search"] == "pbt" else options["scheduler"]
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<style>{_STYLE}</style><script>{get_plotlyjs()}</script></head><body><h1>{title}</h1>
<p>{len(record.trials)} trials ({count_statuses(record.trials)}), {record.cpu_hours:.3f} CPU hours including the finalists.
Search: {options["search"]}, scheduler: {scheduler}. All values are validation {record.metric}; the test split was not used.</p>
<p>Orange: winner. Blue: trained to the end. Grey: stopped early. Purple: unfinished.</p>
<h2>Finalists</h2>{_finalists(record)}
<h2>Best value by CPU hours</h2>{_budget(record)}
<h2>Validation curves</h2>{_curves(record)}
<h2>Values and importance</h2><p>Importance is the share of the variance of the trials' ranks that a key explains alone
(epsilon squared), without interactions. Trials that were stopped early count with their best value.</p>
<div class="keys">{_keys(record)}</div>
<h2>All trials</h2>{_trials(record)}</body></html>
"""


def _figure(traces: list[dict[str, Any]], caption: str, x: str, y: str, kind: str = "linear") -> str:
    """A plot with its caption, which is also what a screen reader gets; the numbers are in the tables."""
    import plotly.graph_objects as go

    axes = {
        "xaxis": {"title": {"text": html.escape(x)}, "type": kind, "exponentformat": "e"},
        "yaxis": {"title": {"text": y}, "automargin": True},
    }
    config = {"responsive": True, "displayModeBar": False}
    plot = go.Figure(traces, _LAYOUT | axes).to_html(full_html=False, include_plotlyjs=False, config=config)
    text = html.escape(caption)
    return f'<figure><div role="img" aria-label="{text}">{plot}</div><figcaption>{text}</figcaption></figure>'


def _trace(record: TuneRecord, trial: Trial, x: list[Any], y: list[Any]) -> dict[str, Any]:
    won = trial.number == record.winner
    look = {"color": _WINNER if won else _COLOURS[trial.status]}
    values = "<br>".join(html.escape(f"{key} = {plain(value)}") for key, value in trial.values.items())
    return {
        **{"x": x, "y": y, "mode": "lines+markers"},
        "line": {**look, "width": 3 if won else 1.3},
        "marker": {**look, "size": 10 if won else 6},
        "hovertemplate": f"%{{y:.4g}} at %{{x}}<br>trial {trial.number}, {trial.status}<br>{values}<extra></extra>",
    }


def _winner_last(record: TuneRecord) -> list[Trial]:
    """In the order of drawing: important trials on top."""
    return sorted(record.trials, key=lambda trial: (trial.number == record.winner, trial.status == "done"))


def _budget(record: TuneRecord) -> str:
    total = sum(trial.seconds for trial in record.trials + record.retrained)
    epochs = sorted(  # of all trials, in the order in which they were reported
        (one.at, one.seconds - before, one.value)
        for trial in record.trials
        for before, one in zip([0.0, *(e.seconds for e in trial.curve)], trial.curve, strict=False)
    )
    hours = np.cumsum([seconds for _, seconds, _ in epochs]) * record.cpu_hours / (total or 1)
    best = (np.maximum if record.mode == "max" else np.minimum).accumulate([value for _, _, value in epochs])
    trace = {"x": hours.tolist(), "y": best.tolist(), "line": {"shape": "hv", "color": _WINNER, "width": 3}}
    caption = f"The search reached {record.metric} {best[-1]:.4f} in {hours[-1]:.3f} CPU hours."
    return _figure([trace], caption, "CPU hours", f"best {record.metric}")


def _curves(record: TuneRecord) -> str:
    traces = [
        _trace(record, trial, [one.epoch for one in trial.curve], [one.value for one in trial.curve])
        for trial in _winner_last(record)
        if trial.curve
    ]
    return _figure(traces, f"{record.metric} after every epoch of {len(traces)} trials.", "epoch", record.metric)


def _keys(record: TuneRecord) -> str:
    """A plot per key, the most important first: its value in every trial against the trial's best value."""
    space, unknown, plots = record.config["tune"]["space"], unmeasured(record.trials), []
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
        plots.append(_figure(traces, f"{key}: importance {importance}.", key, record.metric, kind))
    return "".join(plots)


def _finalists(record: TuneRecord) -> str:
    if not record.finalists:
        return (
            "<p>None (tune.top = 0). The winner's value is the highest of many on one seed, and therefore too high.</p>"
        )
    best = {trial.number: trial.best for trial in record.trials}
    rows: dict[int, list[object]] = {}
    for one in record.finalists:
        seeds = " ".join(f"{seed}: {value:.4f}" for seed, value in zip(one.seeds, one.results, strict=True))
        rows[one.number] = [plain(best[one.number]), f"{one.mean:.4f} ± {one.std:.4f}", seeds, show(one.values)]
    text = "<p>The best trials, trained again on seeds that the search did not use. The winner has the best mean.</p>"
    return text + _table(["trial", "search", "other seeds", "each seed", "values"], rows, record.winner)


def _trials(record: TuneRecord) -> str:
    ranked = Objective(record.metric, record.mode).ranked(record.trials)
    rows: dict[int, list[object]] = {}
    for trial in [*ranked, *(trial for trial in record.trials if trial.best is None)]:
        values = show(trial.values) + (f": {trial.reason}" if trial.reason else "")
        best = "" if trial.best is None else plain(trial.best)
        rows[trial.number] = [trial.status, trial.epochs, f"{trial.seconds:.1f}", best, values]
    return _table(["trial", "status", "epochs", "seconds", record.metric, "values"], rows, record.winner)


def _table(heads: list[str], rows: dict[int, list[object]], winner: int | None) -> str:
    """rows: number of a trial -> the other cells."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in heads)
    body = "".join(
        f"<tr{' class=winner' if number == winner else ''}>"
        + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in [number, *cells])
        for number, cells in rows.items()
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
