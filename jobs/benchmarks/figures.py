"""What every benchmark prints and writes: its figures, and the machine and versions that they were made with."""

import json
import os
import platform
from importlib import metadata
from pathlib import Path

import typer


def report(figures: dict[str, object], out: str | None) -> None:
    """Print the figures; write them as JSON, with machine and versions, where `out` says."""
    for name, value in figures.items():
        typer.echo(f"{name:38} {value:,.2f}" if isinstance(value, float) else f"{name:38} {value}")
    versions = {name: metadata.version(name) for name in ("ray", "torch", "pyarrow", "faiss-cpu") if _there(name)}
    machine = {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version(), **versions}
    typer.echo("  ".join(f"{name} {value}" for name, value in machine.items()))
    if out:
        Path(out).write_text(json.dumps(figures | {"machine": machine}, indent=2) + "\n")


def _there(name: str) -> bool:
    return any(True for _ in metadata.distributions(name=name))


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()
