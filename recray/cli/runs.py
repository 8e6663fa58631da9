"""Verbs about the artefacts of runs: list, delete, serve, compare and verify them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from recray import console, log
from recray.cli.application import ConfigPath, Overrides, Split, app, as_json, load, result, stoppable

if TYPE_CHECKING:
    from recray.config import Config


@app.command()
def runs(output: Annotated[str, typer.Argument(metavar="OUTPUT", help="folder or URI of runs")] = "runs") -> None:
    """List runs and their artefacts: what is in use, metric, age and size."""
    from recray.inventory import list_runs

    entries = list_runs(output)
    if as_json():
        for entry in entries:
            result("runs", "artifact", "", entry.as_json())
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
    if as_json():
        for entry in entries:
            result("prune", "deleted" if yes else "would_delete", "", entry.as_json())
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

    with stoppable():
        found = decide(settings, force)
    lines = [f"{'ok  ' if one.passed else 'FAIL'}  {one.name}: {one.text}" for one in found.checks]
    verdict = "serving" if found.promoted else "held back:"
    lines.append(f"{verdict} checkpoint {found.checkpoint}{' (forced)' if found.forced else ''}")
    result("promote", "result", "\n".join(lines), found.as_json())
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
    result("rollback", "result", f"serving checkpoint {found.checkpoint}, promoted {found.at}", found.model_dump())


def _settings(source: str, overrides: list[str] | None) -> Config:
    """The configuration in a file, or that of the artefacts in use of a run."""
    if source.endswith(".toml"):
        return load(source, overrides)
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
    result("lineage", "lineage", render(node), node.as_json())
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
    result("diff", "diff", render_diff(found), found)
    if any(values for section, values in found.items() if section != "code"):
        raise typer.Exit(1)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="A B ...", help="folders or URIs of runs, or of reports")],
    split: Annotated[Split, typer.Option(help="which report of the runs")] = Split.test,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="also write a page")] = None,
) -> None:
    """Compare reports with the first one: metrics with intervals paired over users, configuration, and cost."""
    from recray import storage
    from recray.report import compare as reports
    from recray.report.html import available

    found = reports.compare(runs, split.value)
    result("compare", "result", reports.render(found), found.as_json())
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
        result("verify", "damaged" if lines else "ok", "\n".join(lines) or ok, one.as_json())
    if any(one.problems for one in found):
        raise typer.Exit(1)
