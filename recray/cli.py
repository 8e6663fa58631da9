"""The `recray` command: one verb per stage, the same functions as `import recray`.

Messages go to standard error (recray.log), results to standard output. With `--json` both are JSON
lines on standard output: {"stage": ..., "event": ..., "values": ...}.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recray import console, credentials, log, progress
from recray.errors import Interrupted, RecrayError

if TYPE_CHECKING:
    from recray.config import Config

_GLOBAL = ("--quiet", "-q", "--verbose", "-v", "--json")  # accepted anywhere on the command line
_json = False

app = typer.Typer(
    name="recray",
    help="Recommender training from Parquet click logs to an evaluated index, on Ray.\n\n"
    "Start with your own log:   recray init s3://bucket/clicks/ > my.toml\n\n"
    "then run every stage:      recray run my.toml\n\n"
    "or one by one:             recray prepare my.toml; recray train my.toml; recray index my.toml; "
    "recray evaluate my.toml",
    epilog="--quiet, --verbose and --json may stand anywhere on the command line.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG.toml", help="configuration file, local or any URI")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="section.key=value", help="override one key, e.g. --set training.epochs=5; repeatable"
    ),
]


class _Split(StrEnum):
    test = "test"
    valid = "valid"


@app.command()
def init(
    uri: Annotated[
        str, typer.Argument(metavar="URI", help="Parquet file, folder or glob of events; local, s3:// or gs://")
    ],
    items: Annotated[str | None, typer.Option(help="Parquet table of item features")] = None,
    users: Annotated[str | None, typer.Option(help="Parquet table of user features")] = None,
    user: Annotated[str | None, typer.Option(help="column of the user id, where it is not found")] = None,
    item: Annotated[str | None, typer.Option(help="column of the item id")] = None,
    time: Annotated[str | None, typer.Option(help="column of the event time")] = None,
    label: Annotated[str | None, typer.Option(help="column of 1 = chosen, 0 = shown and not chosen")] = None,
    weight: Annotated[str | None, typer.Option(help="column of the event's weight")] = None,
) -> None:
    """Print a commented configuration inferred from Parquet files, to be edited.

    It is always printed: a role that is not clear is written as "?" with candidates. Open questions stand on standard
    error, and the exit code is then 2.
    """
    from recray.data.infer import inferred

    found = inferred(
        uri, items, users, {"user": user, "item": item, "timestamp": time, "label": label, "weight": weight}
    )
    _result("init", "configuration", found.toml.rstrip("\n"), vars(found))
    for note in found.notes:
        log.warning("init", note)
    for question in found.questions:
        log.error("init", question, event="question")
    if found.questions:
        raise typer.Exit(2)


@app.command()
def check(
    source: Annotated[
        str, typer.Argument(metavar="PATH|CONFIG.toml", help="Parquet file, folder or glob, or a configuration")
    ],
    user: Annotated[str | None, typer.Option(help="column of the user id, where it is not found")] = None,
    item: Annotated[str | None, typer.Option(help="column of the item id")] = None,
    time: Annotated[str | None, typer.Option(help="column of the event time")] = None,
    label: Annotated[str | None, typer.Option(help="column of 1 = chosen, 0 = shown and not chosen")] = None,
    rows: Annotated[int, typer.Option(min=1, help="events to look at, spread over the log")] = 5_000_000,
    overrides: Overrides = None,
) -> None:
    """Look for what is wrong with a log before it is prepared: what each finding costs, and what fixes it.

    Footers and a sample of events are read; nothing is written. Exit code 0 without errors and warnings (notes do not
    count), 1 with any, 2 if the log cannot be found.
    """
    from recray.data.check import check as look
    from recray.data.check import render

    found = look(source, {"user": user, "item": item, "timestamp": time, "label": label}, rows, overrides or [])
    _result("check", "result", render(found), found.as_json())
    if found.problems:
        raise typer.Exit(1)


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

    settings = _load(config, overrides, starts_ray=True)
    if report is not None and report != "-":
        storage.check_writable(os.path.dirname(report) or ".")
    with _stoppable():
        record = recray.run(settings)
    _result("evaluate", "report", render(record), record.model_dump(mode="json"))
    if report == "-":
        typer.echo(record.model_dump_json())
    elif report is not None:
        storage.write_json(report, record.model_dump(mode="json"))


@app.command()
def prepare(config: ConfigPath, overrides: Overrides = None) -> None:
    """Raw events to a prepared dataset: filter, ids, split, histories, shards."""
    import recray
    from recray.artifacts import Run

    settings = _load(config, overrides, starts_ray=True)
    with _stoppable():
        record = recray.prepare(settings)
    _made("prepare", Run(settings).dataset().uri, record, "")


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train the model on the prepared dataset; resumes a training that was interrupted."""
    import recray
    from recray.artifacts import Run

    settings = _load(config, overrides)
    with _stoppable():
        record = recray.train(settings)
    _made("train", Run(settings).checkpoint().uri, record, f"{record.metric} = {record.value:.4f} (validation)")


@app.command()
def tune(config: ConfigPath, overrides: Overrides = None) -> None:
    """Search values for keys by many trainings on one prepared dataset (section tune); resumes a search that was stopped.

    Trials are compared on the validation split; the test split is not read. Writes tune.json, tune.html (pictures) and
    best.toml, the winner for `recray run`, to <output>/<name>/tune/current.
    """
    import recray

    settings = _load(config, overrides, starts_ray=True)
    from recray.tuning.console import summary  # loads torch
    from recray.tuning.store import sweep_uri

    with _stoppable():
        record = recray.tune(settings)
    _result("tune", "result", summary(record, sweep_uri(settings)), record.model_dump(mode="json"))


@app.command()
def index(config: ConfigPath, overrides: Overrides = None) -> None:
    """Build a faiss index of the checkpoint's item vectors and tune it to retrieval.recall_target."""
    import recray
    from recray.artifacts import Run

    settings = _load(config, overrides)
    with _stoppable():
        record = recray.index(settings)
    _made(
        "index",
        Run(settings).index_artifact().uri,
        record,
        f"{record.factory}  recall@{record.k} = {record.recall:.4f}",
    )


@app.command()
def evaluate(
    config: ConfigPath,
    split: Annotated[
        _Split, typer.Option(help="test: the final figures; valid: to choose values, before the test split is used")
    ] = _Split.test,
    overrides: Overrides = None,
) -> None:
    """Evaluate model, index and baselines; writes report.json and report.html to <output>/<name>/report (or report-valid)
    and prints the report."""
    import recray
    from recray.report.text import render

    settings = _load(config, overrides)
    with _stoppable():
        report = recray.evaluate(settings, split.value)
    _result("evaluate", "report", render(report), report.model_dump(mode="json"))


@app.command()
def report(
    uri: Annotated[str, typer.Argument(metavar="RUN", help="folder or URI of a run, or of a report")],
    split: Annotated[_Split, typer.Option(help="which report of the run")] = _Split.test,
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
    _result("report", "page", written, {"uri": written})


@app.command()
def recommend(
    config: ConfigPath,
    output: Annotated[str, typer.Option(help="folder or URI that the lists are written to, as Parquet")],
    users: Annotated[
        str | None, typer.Option(help="Parquet file of user keys (column data.columns.user); all users without it")
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="items per user")] = 10,
    overrides: Overrides = None,
) -> None:
    """Write every user's final list (user, item, rank, score): what the index finds, in the order of retrieval.ranker."""
    import recray
    from recray import storage

    settings = _load(config, overrides)
    storage.check_writable(output)
    with _stoppable():
        record = recray.recommend(settings, output, users, k)
    _made("recommend", output, record, f"{record.counts['users']:,} users")


@app.command()
def export(
    source: Annotated[str, typer.Argument(metavar="RUN", help="folder or URI of a run, or of a checkpoint")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="folder or URI that the bundle is written to")],
) -> None:
    """Write what a run serves as a bundle: a folder that scores with torch, faiss and pyarrow only (score.py in it)."""
    from recray import storage

    storage.check_writable(output)
    from recray.inference.export import export as write  # loads torch

    manifest = write(source, output)
    _result("export", "bundle", f"{output}  {manifest['lineage']['checkpoint']['id']}", manifest)


@app.command()
def serve(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_BUNDLE", help="folder or URI of a run, or of a bundle")],
    host: Annotated[str, typer.Option(help="address; other than loopback needs a token in RECRAY_SERVE_TOKEN")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    queue: Annotated[int, typer.Option(min=1, help="requests that may wait; more are refused with status 429")] = 64,
    timeout: Annotated[float, typer.Option(min=0.01, help="seconds that a request may wait")] = 1.0,
    poll: Annotated[float, typer.Option(min=0, help="seconds between two looks at what is promoted; 0: never")] = 5.0,
) -> None:
    """Answer over HTTP: POST /recommend, /score, /similar; GET /health, /ready, /metrics, /docs. A promotion is followed."""
    from recray.serving.server import serve as listen

    listen(source, host, port, queue, timeout, poll)


@app.command()
def submit(
    config: ConfigPath,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="dashboard of the cluster's head")
    ] = "http://127.0.0.1:8265",
    detach: Annotated[bool, typer.Option("--detach", help="print the job's id and do not wait")] = False,
    report: Annotated[
        str | None, typer.Option(help="file that the report is written to, as JSON, when the job has finished")
    ] = None,
    requirements: Annotated[
        str | None, typer.Option(help="requirements.lock, to be installed on nodes whose image lacks it")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Run all stages as a job of a Ray cluster, with this code. The exit code is the job's, or 3 if it was stopped.

    The job continues when this command is interrupted. The token is RAY_AUTH_TOKEN or in the file RAY_AUTH_TOKEN_PATH.
    """
    from recray.cluster.submit import Jobs
    from recray.config import load_config

    settings = load_config(config, overrides or [])
    jobs = Jobs(address)
    job = jobs.submit(settings, requirements)
    typer.echo(f"job {job}; stop it with: ray job stop --address {address} {job}")
    if not detach:
        raise typer.Exit(jobs.wait(job, typer.echo, report))


@app.command()
def runs(output: Annotated[str, typer.Argument(metavar="OUTPUT", help="folder or URI of runs")] = "runs") -> None:
    """List runs and their artefacts: what is in use, metric, age and size."""
    from recray.inventory import list_runs

    entries = list_runs(output)
    if _json:
        for entry in entries:
            _result("runs", "artifact", "", entry.as_json())
        return
    if not entries:
        raise typer.BadParameter(f"no runs in {output}")
    console.table(entries)


@app.command()
def prune(
    config: ConfigPath,
    keep: Annotated[
        int | None, typer.Option(min=0, help="newest artefacts of each stage to keep; run.keep without it")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="delete; without it only show what would be deleted")] = False,
    overrides: Overrides = None,
) -> None:
    """Delete old artefacts of a run. Those in use, the newest ones, and what they were made from are kept."""
    import recray
    from recray import inventory

    settings = recray.load_config(config, overrides or [])
    number = settings.run.keep if keep is None else keep
    entries = (inventory.prune if yes else inventory.prunable)(settings.run_uri, number)
    if _json:
        for entry in entries:
            _result("prune", "deleted" if yes else "would_delete", "", entry.as_json())
    elif not entries:
        typer.echo("nothing to delete")
    else:
        console.table(entries)
        size = sum(entry.bytes for entry in entries)
        typer.echo(f"{'deleted' if yes else 'would delete'} {len(entries)} artefacts, {console.size(size)}")
        if not yes:
            typer.echo("nothing was deleted: add --yes to delete")


@app.command()
def promote(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG.toml|RUN", help="configuration, or folder or URI of a run, whose artefacts in use"
        ),
    ],
    force: Annotated[bool, typer.Option("--force", help="serve it without checks")] = False,
    exit_zero: Annotated[
        bool, typer.Option("--exit-zero", help="exit code 0 for a candidate that is held back, too")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Serve a run's newest checkpoint and index, if they pass the checks of [promotion] against what is served.

    Exit code 0 if the candidate is served, 1 if it is held back (what was served stays), 2 for an error.
    """
    settings = _settings(source, overrides)
    from recray.evaluation.promote import promote as decide

    with _stoppable():
        found = decide(settings, force)
    lines = [f"{'ok  ' if one.passed else 'FAIL'}  {one.name}: {one.text}" for one in found.checks]
    verdict = "serving" if found.promoted else "held back:"
    lines.append(f"{verdict} checkpoint {found.checkpoint}{' (forced)' if found.forced else ''}")
    _result("promote", "result", "\n".join(lines), found.as_json())
    if not (found.promoted or exit_zero):
        raise typer.Exit(1)


@app.command()
def rollback(
    source: Annotated[str, typer.Argument(metavar="CONFIG.toml|RUN", help="configuration, or folder or URI of a run")],
    overrides: Overrides = None,
) -> None:
    """Serve what was served before the last promotion. Exit code 2 if there is nothing to return to."""
    settings = _settings(source, overrides)
    from recray.evaluation.promote import rollback as back

    found = back(settings)
    _result("rollback", "result", f"serving checkpoint {found.checkpoint}, promoted {found.at}", found.model_dump())


def _settings(source: str, overrides: list[str] | None) -> Config:
    """The configuration in a file, or that of the artefacts in use of a run."""
    if source.endswith(".toml"):
        return _load(source, overrides)
    from recray.artifacts import CHECKPOINT, in_use
    from recray.config import parse_config
    from recray.inference import config_of

    config = config_of(in_use(source.rstrip("/"), CHECKPOINT))
    return parse_config(config.model_dump(mode="json"), overrides or [])


@app.command()
def lineage(uri: Annotated[str, typer.Argument(metavar="URI", help="folder of an artefact or a run")]) -> None:
    """Show what an artefact, or the last one of a run, was made from, down to the raw files, with code and time.

    Exit code 0; 1 if a record of the chain is missing; 2 if the folder holds no artefact.
    """
    from recray.lineage import lineage as trace
    from recray.lineage import render

    node = trace(uri)
    _result("lineage", "lineage", render(node), node.as_json())
    if not node.complete:
        raise typer.Exit(1)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="folder of an artefact or a run")],
    b: Annotated[str, typer.Argument(metavar="B", help="another one of the same stage")],
) -> None:
    """Show what differs between two artefacts or runs: configuration, data, code and result.

    Exit code 0 if configuration, data and result are the same; 1 if they differ; 2 if they cannot be compared.
    """
    from recray.lineage import diff as compare
    from recray.lineage import render_diff

    found = compare(a, b)
    _result("diff", "diff", render_diff(found), found)
    if any(values for section, values in found.items() if section != "code"):
        raise typer.Exit(1)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="A B ...", help="folders or URIs of runs, or of reports")],
    split: Annotated[_Split, typer.Option(help="which report of the runs")] = _Split.test,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="also write a page")] = None,
) -> None:
    """Compare reports with the first one: metrics with intervals paired over users, configuration, and cost."""
    from recray import storage
    from recray.report import compare as reports
    from recray.report.html import available

    found = reports.compare(runs, split.value)
    _result("compare", "result", reports.render(found), found.as_json())
    if html is not None and available("compare", html):
        storage.write_bytes(html, reports.page(found).encode())
        log.info("compare", f"page: {html}", event="page", values={"uri": html})


@app.command()
def verify(
    uri: Annotated[str, typer.Argument(metavar="RUN_OR_ARTEFACT", help="folder or URI of a run, an artefact or lists")],
) -> None:
    """Read all files of a run again and compare them with their hashes. Exit code 1 if one is damaged, missing or unknown."""
    from recray.verification import verify as compare

    found = compare(uri)
    for one in found:
        name = f"{one.kind}  {one.uri}" if one.kind else one.uri
        lines = [f"{name}: {problem}" for problem in one.problems]
        ok = f"{name}: ok, {one.files} files, {console.size(one.bytes)}"
        _result("verify", "damaged" if lines else "ok", "\n".join(lines) or ok, one.as_json())
    if any(one.problems for one in found):
        raise typer.Exit(1)


@app.command()
def keys(
    section: Annotated[
        str | None, typer.Argument(metavar="[SECTION]", help="e.g. training, data.columns, model.din, training.epochs")
    ] = None,
) -> None:
    """Print every configuration key with type, default, range and meaning."""
    from recray.config.reference import keys as reference

    found = reference(section)
    if _json:
        for key in found:
            _result("keys", "key", "", vars(key))
        return
    rows = [
        (f"{key.section}.{key.name}", f"{key.type}, {key.range}" if key.range else key.type, key.default, key.meaning)
        for key in found
    ]
    if not sys.stdout.isatty():
        typer.echo("\n".join("\t".join(row) for row in rows))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("key", "type", "default", "meaning", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console().print(table, markup=False)


@app.command()
def doctor(env: Annotated[bool, typer.Option("--env", hidden=True)] = True) -> None:
    """Check versions, devices, collectives, shared memory and disk of this machine, and of every node of the cluster
    that RAY_ADDRESS names. Exit code 1 if there is a problem.
    """
    from recray.cluster.doctor import examine, render

    text, problems = render(examine())
    typer.echo(text)
    if problems:
        raise typer.Exit(1)


@app.callback()
def _options(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="warnings and results only")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="details, too")] = False,
    json: Annotated[bool, typer.Option("--json", help="messages and results as JSON lines on standard output")] = False,
) -> None:
    global _json
    _json = json
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    # Results are JSON lines of the same logger: --quiet must not drop them.
    form: log.Format = "json" if json else "rich" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else "plain"
    log.configure(form, level)


def _load(path: str, overrides: list[str] | None, starts_ray: bool = False) -> Config:
    """The configuration, and what can be seen to fail before torch and Ray are loaded, which takes seconds."""
    from recray import storage
    from recray.cluster import runtime
    from recray.config import load_config

    config = load_config(path, overrides or [])
    storage.check_writable(config.run_uri)
    if starts_ray or config.scaling.num_workers > 1 or (runtime.is_shared() and config.scaling.num_workers):
        runtime.check()
    return config


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM or Ctrl-C first saves the state of a training, or deletes what another stage has half written; the exit code
    is 128 + the signal's number, as in a shell."""
    from recray.training import interrupt

    # Loading torch and starting Ray take seconds, in which nothing else shows progress.
    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    with interrupt.graceful(), progress.scope():
        try:
            with progress.task("recray", verb, lines=False):
                yield
        except Interrupted as error:
            log.warning("train", str(error), event="stopped")
            raise typer.Exit(128 + (interrupt.received() or signal.SIGTERM)) from None


def _made(stage: str, uri: str, record: Any, note: str) -> None:
    """What a stage made: where it lies, its id, and its main figure."""
    text = f"{uri}  {record.id}{f'  {note}' if note else ''}"
    _result(stage, "result", text, {"uri": uri, **record.model_dump(mode="json")})


def _result(stage: str, event: str, text: str, values: dict[str, Any]) -> None:
    if _json:
        log.result(stage, event, values)
    else:
        typer.echo(text)


def main() -> None:
    """Entry point: an error that recray raises on purpose is one message and exit code 2, not a traceback."""
    # Options of the whole command may follow the verb, where people write them.
    first = [word for word in sys.argv[1:] if word in _GLOBAL]
    rest = [word for word in sys.argv[1:] if word not in _GLOBAL]
    try:
        for word in rest:
            credentials.refuse(word, "the command line")
        app([*first, *rest])
    except RecrayError as error:
        if _json:
            log.error("recray", f"{type(error).__name__}: {error}", event="error")
        else:
            typer.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
