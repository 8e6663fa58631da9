"""Verbs that take a run to where it is used: recommend, export, serve, submit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from recray.cli.application import ConfigPath, Overrides, app, load, made, result, stoppable

if TYPE_CHECKING:
    pass


@app.command()
def recommend(
    config: ConfigPath,
    output: Annotated[str, typer.Option(help="folder or URI that the lists are written to, as Parquet")],
    users: Annotated[
        str | None, typer.Option(help="Parquet file of user keys (column data.columns.user); all users without it")
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="items per user")] = 10,
    titles: Annotated[bool, typer.Option("--titles", help="add a column title, from the item table")] = False,
    own_names: Annotated[
        bool, typer.Option("--own-names", help="call the columns user and item as data.columns does")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Write every user's final list (user, item, rank, score): what the index finds, in the order of retrieval.ranker."""
    import recray
    from recray import storage

    settings = load(config, overrides)
    storage.check_writable(output)
    with stoppable():
        record = recray.recommend(settings, output, users, k, titles, own_names)
    made("recommend", output, record, f"{record.counts['users']:,} users")


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
    result("export", "bundle", f"{output}  {manifest['lineage']['checkpoint']['id']}", manifest)


@app.command()
def serve(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_BUNDLE", help="folder or URI of a run, or of a bundle")],
    host: Annotated[str, typer.Option(help="address; other than loopback needs a token in RECRAY_SERVE_TOKEN")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    wait: Annotated[
        float, typer.Option(min=0, help="seconds; what would wait longer is refused with status 429")
    ] = 0.05,
    timeout: Annotated[float, typer.Option(min=0.01, help="seconds; what waited longer all the same is refused")] = 1.0,
    poll: Annotated[float, typer.Option(min=0, help="seconds between two looks at what is promoted; 0: never")] = 5.0,
) -> None:
    """Answer over HTTP: POST /recommend, /score, /similar; GET /health, /ready, /metrics, /docs. A promotion is followed."""
    from recray.serving.server import serve as listen

    listen(source, host, port, wait, timeout, poll)


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
