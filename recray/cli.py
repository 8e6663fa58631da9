"""The `recray` command: one verb per stage, the same functions as `import recray`."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

from recray.errors import RecrayError

app = typer.Typer(
    name="recray",
    help="Recommender training from Parquet click logs to an evaluated index, on Ray.\n\n"
    "Start with your own log:   recray init s3://bucket/clicks/ > my.toml\n\n"
    "then run every stage:      recray run my.toml\n\n"
    "or one by one:             recray prepare my.toml; recray train my.toml; recray index my.toml; "
    "recray evaluate my.toml",
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
) -> None:
    """Print a commented configuration inferred from Parquet files, to be edited."""
    from recray.data.infer import infer

    typer.echo(infer(uri, items=items, users=users), nl=False)


@app.command()
def run(config: ConfigPath, overrides: Overrides = None) -> None:
    """All stages: prepare, train, index, evaluate. Completed stages are reused."""
    from recray.config import load_config
    from recray.pipeline import run_all
    from recray.report.text import render

    typer.echo(render(run_all(load_config(config, overrides or []))))


@app.command()
def prepare(config: ConfigPath, overrides: Overrides = None) -> None:
    """Raw events to a prepared dataset: filter, ids, split, histories, shards."""
    import recray

    settings = recray.load_config(config, overrides or [])
    record = recray.prepare(settings)
    typer.echo(f"{settings.dataset_uri}  {record.id}")


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train the model on the prepared dataset; goes on from the last checkpoint of a run that was ended."""
    import recray

    settings = recray.load_config(config, overrides or [])
    record = recray.train(settings)
    typer.echo(f"{settings.run_uri}/checkpoint  {record.id}  {record.metric} = {record.value:.4f} (validation)")


@app.command()
def tune(config: ConfigPath, overrides: Overrides = None) -> None:
    """Search values for keys by many trains on one prepared dataset (section tune); goes on with a sweep that was ended.

    Validation decides, the test split stays closed. Writes <output>/<name>/tune/: tune.json, tune.html (pictures) and
    best.toml, the winner for `recray run`.
    """
    import recray
    from recray.tuning.console import summary
    from recray.tuning.store import sweep_uri

    settings = recray.load_config(config, overrides or [])
    typer.echo(summary(recray.tune(settings), sweep_uri(settings)))


@app.command()
def index(config: ConfigPath, overrides: Overrides = None) -> None:
    """Build a faiss index of the checkpoint's item vectors and tune it to retrieval.recall_target."""
    import recray

    settings = recray.load_config(config, overrides or [])
    record = recray.index(settings)
    typer.echo(f"{settings.run_uri}/index  {record.id}  {record.factory}  recall@{record.k} = {record.recall:.4f}")


@app.command()
def evaluate(
    config: ConfigPath,
    split: Annotated[_Split, typer.Option(help="test, once; valid to choose by")] = _Split.test,
    overrides: Overrides = None,
) -> None:
    """Evaluate model, index and baselines; writes report/report.json, of validation report-valid/report.json, and prints it."""
    import recray
    from recray.report.text import render

    typer.echo(render(recray.evaluate(recray.load_config(config, overrides or []), split.value)))


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

    recray.recommend(recray.load_config(config, overrides or []), output, users, k)


@app.command()
def submit(
    config: ConfigPath,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="dashboard of the cluster's head")
    ] = "http://127.0.0.1:8265",
    detach: Annotated[bool, typer.Option("--detach", help="print the job's id and do not wait")] = False,
    report: Annotated[
        str | None, typer.Option(help="file that report.json is written to when the job has ended")
    ] = None,
    requirements: Annotated[
        str | None, typer.Option(help="requirements.lock, to be installed on nodes whose image lacks it")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Run all stages as a job of a Ray cluster, with this code. Exit code: the job's, 3 where it was stopped.

    The token is RAY_AUTH_TOKEN, or the file that RAY_AUTH_TOKEN_PATH names.
    """
    from recray.cluster.submit import Jobs
    from recray.config import load_config

    jobs = Jobs(address)
    job = jobs.submit(load_config(config, overrides or []), requirements)
    typer.echo(f"job {job}; it goes on when this command ends: ray job stop --address {address} {job}")
    if not detach:
        raise typer.Exit(jobs.wait(job, report))


@app.command()
def doctor(
    env: Annotated[
        bool, typer.Option("--env", help="versions, devices and room of this machine, and of a cluster's nodes")
    ] = False,
) -> None:
    """Say what is wrong and what to do. Joins the cluster that RAY_ADDRESS names. Exit code 1 where a line is red."""
    from recray.cluster.doctor import examine, show

    if not env:
        raise typer.BadParameter("name what to look at: --env")
    if not show(examine()):
        raise typer.Exit(1)


def main() -> None:
    """Entry point: an error that recray raises on purpose is one message, not a traceback."""
    try:
        app()
    except RecrayError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
