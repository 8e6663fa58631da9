"""Verbs of the stages: run, prepare, train, tune, index, evaluate, report, replay."""

from __future__ import annotations

import os
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from recray.cli.application import ConfigPath, Overrides, Split, app, load, made, result, stoppable

if TYPE_CHECKING:
    pass


@app.command()
def run(
    config: ConfigPath,
    report: Annotated[
        str | None, typer.Option(help="also write the report as JSON to this file; - = one line on standard output")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """All stages: prepare, train, index, evaluate. Stages that are up to date do no work."""
    import recray
    from recray import storage
    from recray.report.text import render

    settings = load(config, overrides, starts_ray=True)
    if report is not None and report != "-":
        storage.check_writable(os.path.dirname(report) or ".")
    with stoppable():
        record = recray.run(settings)
    result("evaluate", "report", render(record), record.model_dump(mode="json"))
    if report == "-":
        typer.echo(record.model_dump_json())
    elif report is not None:
        storage.write_json(report, record.model_dump(mode="json"))


@app.command()
def prepare(config: ConfigPath, overrides: Overrides = None) -> None:
    """Raw events to a prepared dataset: filter, ids, split, histories, shards."""
    import recray
    from recray.artifacts import Run

    settings = load(config, overrides, starts_ray=True)
    with stoppable():
        record = recray.prepare(settings)
    made("prepare", Run(settings).dataset().uri, record, "")


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train the model on the prepared dataset; resumes a training that was interrupted."""
    import recray
    from recray.artifacts import Run

    settings = load(config, overrides)
    with stoppable():
        record = recray.train(settings)
    made("train", Run(settings).checkpoint().uri, record, f"{record.metric} = {record.value:.4f} (validation)")


@app.command()
def tune(config: ConfigPath, overrides: Overrides = None) -> None:
    """Search values for keys by many trainings on one prepared dataset (section tune); resumes a search that was stopped.

    Trials are compared on the validation split; the test split is not read. Writes tune.json, tune.html (pictures) and
    best.toml, the winner for `recray run`, to <output>/<name>/tune/current.
    """
    import recray

    settings = load(config, overrides, starts_ray=True)
    from recray.tuning.console import summary  # loads torch
    from recray.tuning.store import sweep_uri

    with stoppable():
        record = recray.tune(settings)
    result("tune", "result", summary(record, sweep_uri(settings)), record.model_dump(mode="json"))


@app.command()
def index(config: ConfigPath, overrides: Overrides = None) -> None:
    """Build a faiss index of the checkpoint's item vectors and tune it to retrieval.recall_target."""
    import recray
    from recray.artifacts import Run

    settings = load(config, overrides)
    with stoppable():
        record = recray.index(settings)
    made(
        "index",
        Run(settings).index_artifact().uri,
        record,
        f"{record.factory}  recall@{record.k} = {record.recall:.4f}",
    )


@app.command()
def evaluate(
    config: ConfigPath,
    split: Annotated[
        Split, typer.Option(help="test: the final figures; valid: to choose values, before the test split is used")
    ] = Split.test,
    overrides: Overrides = None,
) -> None:
    """Evaluate model, index and baselines; writes report.json and report.html to <output>/<name>/report (or report-valid)
    and prints the report."""
    import recray
    from recray.report.text import render

    settings = load(config, overrides)
    with stoppable():
        report = recray.evaluate(settings, split.value)
    result("evaluate", "report", render(report), report.model_dump(mode="json"))


@app.command()
def report(
    uri: Annotated[str, typer.Argument(metavar="RUN", help="folder or URI of a run, or of a report")],
    split: Annotated[Split, typer.Option(help="which report of the run")] = Split.test,
    title: Annotated[
        str | None, typer.Option(help="column of the item table that names items; report.title without it")
    ] = None,
) -> None:
    """Write the page of a run's report, report.html next to report.json, again, and print where it is."""
    from recray.artifacts import in_use, report_stage
    from recray.report import page

    written = page.write(in_use(uri.rstrip("/"), report_stage(split.value)).uri, title)
    if written is None:
        raise typer.Exit(2)
    result("report", "page", written, {"uri": written})


@app.command()
def replay(
    config: ConfigPath,
    step: Annotated[str, typer.Option(help="length of a step: 1h, 1d")],
    begin: Annotated[datetime, typer.Option("--from", help="start of the first step, UTC: 2017-10-02T00:00:00")],
    end: Annotated[datetime, typer.Option("--to", help="end of the last step, UTC")],
    overrides: Overrides = None,
) -> None:
    """Walk the log forward: at each step train on what came before it, and ask a frozen, a continued and a retrained model,
    rolling popularity and transitions what comes next.

    Writes replay.json, replay.html (a curve of each metric over time) and a record of every step, which is not done again, to
    <output>/<name>-replay/replay/.
    """
    settings = load(config, overrides, starts_ray=True)
    from recray.evaluation.replay import render
    from recray.evaluation.replay import replay as walk  # loads torch

    with stoppable():
        found = walk(settings, step, begin, end)
    result("replay", "result", render(found), found.as_json())
