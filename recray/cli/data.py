"""Verbs that look at a log before anything is made of it: init, check."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from recray import console, log
from recray.cli.application import Overrides, app, result

if TYPE_CHECKING:
    pass


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
    result("init", "configuration", found.toml.rstrip("\n"), vars(found))
    for note in found.notes:
        log.warning("init", note)
    for question in found.questions:
        log.error("init", question, event="question")
    if found.questions:
        raise typer.Exit(2)


@app.command()
def compact(
    uri: Annotated[str, typer.Argument(metavar="PATH", help="Parquet file, folder or glob; local, s3:// or gs://")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="empty folder or URI that the new files are written to")],
    sort: Annotated[str | None, typer.Option(help="column that each new file is sorted by, such as the time")] = None,
) -> None:
    """Write many small Parquet files as a few that stream well, and print the reading speed before and after."""
    from recray.data.compact import compact as rewrite

    done = rewrite(uri, output, sort)
    text = (
        f"{done.files_before:,} files to {done.files:,}, {done.rows:,} rows, {console.size(done.bytes_before)} to "
        f"{console.size(done.bytes)}; reading: {done.rows_per_second_before:,.0f} to {done.rows_per_second:,.0f} rows/s "
        f"({done.rows_per_second / done.rows_per_second_before:.1f}x)"
    )
    result("compact", "result", text, vars(done))


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
    result("check", "result", render(found), found.as_json())
    if found.problems:
        raise typer.Exit(1)
