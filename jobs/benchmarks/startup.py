"""Time of a run that is not training: command to first step, gaps between epochs, last step to exit."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.figures import report


def run(
    workers: Annotated[int, typer.Option(help="training workers; 0 = without Ray")] = 1,
    out: Annotated[str | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """`recray train` on the built-in data: command to first step, waits for later epochs, last step to exit."""
    from recray.config import load_config
    from recray.records import CheckpointRecord

    folder = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as output:
        overrides = [f"run.output={output}", f"scaling.num_workers={workers}", "training.epochs=3"]
        config = load_config(str(folder / "configs" / "demo.toml"), overrides)
        arguments = [str(folder / "configs" / "demo.toml"), *(p for one in overrides for p in ("--set", one))]
        subprocess.run([sys.executable, "-m", "recray", "prepare", *arguments], check=True)
        started = time.time()
        subprocess.run([sys.executable, "-m", "recray", "train", *arguments], check=True)
        ended = time.time()
        history = CheckpointRecord.read(f"{config.run_uri}/checkpoint/current").history
    last = history[-1]["first_step_at"] - history[-1]["first_batch_seconds"] + history[-1]["seconds"]
    figures: dict[str, object] = {
        "first_step_seconds": history[0]["first_step_at"] - started,
        "later_epochs_first_batch_seconds": max(entry["first_batch_seconds"] for entry in history[1:]),
        "last_step_to_exit_seconds": ended - last,
        "workers": workers,
    }
    report(figures, out)
