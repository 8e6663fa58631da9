"""Peers run in environments of their own, on the same data: their scripts lie in jobs/peers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

PEERS = {
    "rectools": ["rectools[torch]==0.19.0", "pyarrow<20"],
    "rechub": ["torch-rechub==0.9.0"],
    "deepctr": ["deepctr-torch==0.3.0", "requests", "scikit-learn"],
}


def run(folder: Annotated[str, typer.Argument(help="where environments are made, one a peer")]) -> None:
    """Install the peers, each into an environment of its own with the torch that recray has."""
    import torch

    for name, packages in PEERS.items():
        home = Path(folder) / name
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        # torch first and alone: no later resolution may pick another build of it.
        for wanted in ([f"torch=={torch.__version__.split('+')[0]}"], packages):
            subprocess.run([str(home / "bin" / "pip"), "install", "--quiet", *wanted], check=True)
        typer.echo(f"{name:34} {home}")


def figures_of(folder: str, name: str, script: str, *arguments: str) -> dict[str, Any]:
    """What a peer's script prints as its last line."""
    python, path = Path(folder) / name / "bin" / "python", Path(__file__).parents[1] / "peers" / script
    done = subprocess.run([str(python), str(path), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures
