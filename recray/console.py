"""What commands print: tables, ages and sizes."""

from __future__ import annotations

from typing import Any

import typer


def table(entries: list[Any]) -> None:
    """One line an artefact, aligned."""
    heads = ("run", "stage", "artefact", "", "age", "size", "")
    rows = [
        (
            e.run,
            e.stage,
            e.identity,
            "served" if e.served else "in use" if e.in_use else "",
            _age(e.age_seconds),
            size(e.bytes),
            e.summary,
        )
        for e in entries
    ]
    pages = [f"{e.run}  {e.page}" for e in entries if e.in_use and e.page]
    widths = [max(len(str(row[i])) for row in [heads, *rows]) for i in range(len(heads))]
    for row in [heads, *rows]:
        typer.echo("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    if pages:
        typer.echo("\n".join(["", "pages", *pages]))


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def size(number: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1024:
            return f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.1f} TB"
