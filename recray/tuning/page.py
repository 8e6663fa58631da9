"""tune.html: one file with its pictures inside, no script from elsewhere and none at all."""

from __future__ import annotations

import html
from collections.abc import Sequence

from recray.records import Trial, TuneRecord
from recray.tuning.charts import Axis, Line, importance_bars, lines, parallel
from recray.tuning.space import plain, show

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1000px; padding: 0 1rem; color: #1c2733; background: #fff }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin: 2.2rem 0 .2rem }
p { margin: .2rem 0 .8rem; color: #51606f } code { background: #f0f3f6; padding: .1rem .3rem; border-radius: 3px }
table { border-collapse: collapse; width: 100%; font-size: 13px } td, th { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #e3e8ed }
td:last-child, th:last-child { text-align: left } tr.winner { background: #fff4e5; font-weight: 600 } .scroll { overflow-x: auto }
svg { width: 100%; height: auto; display: block } svg text { font: 12px system-ui, sans-serif; fill: #51606f; paint-order: stroke; stroke: #fff; stroke-width: 3px }
"""
_COLOURS = {"done": "#2a6fb0", "pruned": "#b4bec8", "failed": "#c0392b", "paused": "#8e7cc3", "cut": "#8e7cc3"}
_WINNER = "#e67e22"


def render(record: TuneRecord) -> str:
    trials = record.trials
    counts = {status: sum(trial.status == status for trial in trials) for status in _COLOURS}
    shown = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    name, search = record.config["run"]["name"], record.config["tune"]
    head = f"Sweep {name}"
    lead = (
        f"{len(trials)} trials ({shown}), {record.cpu_hours:.3f} CPU hours with the retraining. Search {search['search']}, "
        f"scheduler {'none' if search['search'] == 'pbt' else search['scheduler']}. All numbers are validation {record.metric}; "
        f"the test split was not opened."
    )
    parts = [
        f"<h1>{html.escape(head)}</h1><p>{html.escape(lead)}</p>",
        _section("Finalists", _finalists_text(record), _finalists(record)),
        _section(
            "Best so far",
            "Best validation value against the CPU hours that all trials had used by then.",
            lines([Line(_so_far(record), _WINNER, step=True, wide=True)], "CPU hours", record.metric, from_zero=True),
        ),
        _section(
            "Parallel coordinates",
            "A line is a trial. Orange: the winner; blue: trained to its end; grey: ended early; purple: cut, or left waiting, by the budget.",
            _parallel(record),
        ),
        _section(
            "Importance",
            "Share of the variance of the trials' ranks that lies between values of a key (epsilon squared, Kelley 1935; a range "
            "in quarters). A key alone: interactions are not seen, and trials that were ended early count with what they had reached.",
            importance_bars(record.importance),
        ),
        _section("Curves", _curves_text(counts), _curves(record)),
        _section("Trials", "", _table(record)),
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(head)}</title><style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _section(title: str, text: str, body: str) -> str:
    return f"<h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>{body}"


def _so_far(record: TuneRecord) -> list[tuple[float, float]]:
    """(CPU hours, best value) in the order in which epochs were reported."""
    done = [
        (one.at, one.seconds - before.seconds if before else one.seconds, one.value)
        for trial in record.trials
        for before, one in zip([None, *trial.curve], trial.curve, strict=False)
    ]
    total = sum(trial.seconds for trial in record.trials + record.retrained)
    cpus = record.cpu_hours / total if total else 0.0  # hours a second: as many CPUs as a trial holds
    better = max if record.mode == "max" else min
    points: list[tuple[float, float]] = []
    hours = 0.0
    for _, seconds, value in sorted(done):
        hours += seconds * cpus
        points.append((hours, better(points[-1][1], value) if points else value))
    return points


def _winner_last(record: TuneRecord) -> Sequence[Trial]:
    """So that what matters is drawn over the rest."""
    order = {"pruned": 0, "paused": 1, "cut": 1, "failed": 1, "done": 2}
    return sorted(record.trials, key=lambda trial: (trial.number == record.winner, order[trial.status]))


def _colour(record: TuneRecord, trial: Trial) -> str:
    return _WINNER if trial.number == record.winner else _COLOURS[trial.status]


def _curves_text(counts: dict[str, int]) -> str:
    return f"Validation after every epoch. Grey ends where the scheduler ended the trial ({counts['pruned']} of them)."


def _curves(record: TuneRecord) -> str:
    drawn = [
        Line(
            [(float(one.epoch), one.value) for one in trial.curve],
            _colour(record, trial),
            wide=trial.number == record.winner,
            dot=trial.status == "pruned",
        )
        for trial in _winner_last(record)
        if trial.curve
    ]
    return lines(drawn, "epoch", record.metric)


def _parallel(record: TuneRecord) -> str:
    keys = list(dict.fromkeys(key for trial in record.trials for key in trial.values))
    space = record.config["tune"]["space"]
    axes = [
        Axis(key, [trial.values.get(key) for trial in record.trials], log=bool(space.get(key, {}).get("log")))
        for key in keys
    ]
    axes.append(Axis(record.metric, [trial.best for trial in record.trials], log=False))
    order = {trial.number: at for at, trial in enumerate(record.trials)}
    rows = [
        (order[trial.number], _colour(record, trial), trial.number == record.winner)
        for trial in _winner_last(record)
        if trial.best is not None
    ]
    return parallel(axes, rows)


def _finalists_text(record: TuneRecord) -> str:
    if not record.finalists:
        return "The best were not trained again on other seeds (tune.top = 0): its value is the highest of many, and so too high."
    return (
        "The best trials, trained again on seeds that the search did not use: a value that was chosen for being high is too "
        "high. The first is the winner."
    )


def _finalists(record: TuneRecord) -> str:
    own = {trial.number: trial for trial in record.trials}
    rows = [
        [
            str(one.number),
            f"{own[one.number].best:.4f}",
            f"{one.mean:.4f} +- {one.std:.4f}",
            " ".join(f"{value:.4f}" for value in one.results),
            show(one.values),
        ]
        for one in record.finalists
    ]
    heads = ["trial", "found at", "on other seeds", "each", "values"]
    return _rows(heads, rows, [one.number == record.winner for one in record.finalists]) if rows else ""


def _table(record: TuneRecord) -> str:
    better = -1 if record.mode == "max" else 1
    last = float("inf")
    ranked = sorted(record.trials, key=lambda trial: better * trial.best if trial.best is not None else last)
    rows = [
        [
            str(trial.number),
            trial.status,
            str(trial.epochs),
            f"{trial.seconds:.1f}",
            plain(trial.best) if trial.best is not None else "",
            show(trial.values) + (f": {trial.reason}" if trial.reason else ""),
        ]
        for trial in ranked
    ]
    heads = ["trial", "", "epochs", "seconds", record.metric, "values"]
    return _rows(heads, rows, [trial.number == record.winner for trial in ranked])


def _rows(heads: list[str], rows: list[list[str]], marked: list[bool]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    body = "".join(
        f"<tr{' class=winner' if mark else ''}>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
        for row, mark in zip(rows, marked, strict=True)
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
