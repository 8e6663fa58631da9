"""Verbs about recray itself: keys, doctor."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from recray.cli.application import app, as_json, result

if TYPE_CHECKING:
    pass


@app.command()
def keys(
    section: Annotated[
        str | None, typer.Argument(metavar="[SECTION]", help="e.g. training, data.columns, model.din, training.epochs")
    ] = None,
) -> None:
    """Print every configuration key with type, default, range and meaning."""
    from recray.config.reference import keys as reference

    found = reference(section)
    if as_json():
        for key in found:
            result("keys", "key", "", vars(key))
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
