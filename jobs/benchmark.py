"""Benchmarks, every figure a ratio against something in the same run on the same machine.

    python jobs/benchmark.py sequence --events ../shared/data/ml-1m/events.parquet --peer-python .venv-peers/bin/python

The peer runs in its own environment:  python3 -m venv .venv-peers
    .venv-peers/bin/pip install torch==2.13.0 && .venv-peers/bin/pip install 'rectools[torch]==0.19.0' 'pyarrow<20'
"""

import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


@app.callback()
def benchmarks() -> None:
    """One subcommand a benchmark."""


@app.command()
def sequence(
    events: Annotated[str, typer.Option(help="ml-1m's events.parquet: user_id, item_id, timestamp (a position)")],
    peer_python: Annotated[str | None, typer.Option(help="python of an environment with rectools[torch]")] = None,
    epochs: Annotated[int, typer.Option(help="epochs of each, the fastest counts")] = 2,
    out: Annotated[str | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """SASRec (full softmax, d 64, 2 blocks, 1 head, length 200, batch 128): seconds an epoch, against RecTools."""
    import torch

    import recray
    from recray.config import parse_config

    with tempfile.TemporaryDirectory() as folder:
        table = {
            "run": {"name": "sequence", "output": folder},
            "data": {
                "path": events,
                "timestamp_unit": "order",
                "columns": {"timestamp": "timestamp"},
                "split": {"kind": "leave_last"},
            },
            "model": {"name": "sasrec", "dim": 64, "layers": 2, "heads": 1, "history_length": 200, "dropout": 0.2},
            "loss": {"name": "softmax"},
            "training": {"epochs": epochs, "global_batch_size": 128, "validate_every": epochs},
            "scaling": {"num_workers": 0},
        }
        config = parse_config(table)
        recray.prepare(config)
        ours = min(entry["seconds"] for entry in recray.train(config).history)
    figures: dict[str, object] = {
        "recray_seconds": ours,
        "torch": torch.__version__,
        "cpu": platform.processor(),
        "threads": torch.get_num_threads(),
    }
    if peer_python:
        script = Path(__file__).parent / "peers" / "rectools_sasrec.py"
        done = subprocess.run(
            [peer_python, str(script), events, str(epochs)], capture_output=True, text=True, check=True
        )
        theirs = json.loads(done.stdout.strip().splitlines()[-1])
        figures |= {"rectools_seconds": min(theirs["seconds"]), "speedup": min(theirs["seconds"]) / ours}
    _report(figures, out)


@app.command()
def startup(
    workers: Annotated[int, typer.Option(help="training workers; 0 = without Ray")] = 1,
    out: Annotated[str | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """`python jobs/train.py` on the built-in data: command to first step, waits for later epochs, last step to exit."""
    from recray.config import load_config
    from recray.records import CheckpointRecord

    folder = Path(__file__).parent
    with tempfile.TemporaryDirectory() as output:
        overrides = [f"run.output={output}", f"scaling.num_workers={workers}", "training.epochs=3"]
        config = load_config(str(folder / "configs" / "demo.toml"), overrides)
        arguments = [str(folder / "configs" / "demo.toml"), *(p for one in overrides for p in ("--set", one))]
        subprocess.run([sys.executable, str(folder / "prepare.py"), *arguments], check=True)
        started = time.time()
        subprocess.run([sys.executable, str(folder / "train.py"), *arguments], check=True)
        ended = time.time()
        history = CheckpointRecord.read(f"{config.run_uri}/checkpoint").history
    last = history[-1]["first_step_at"] - history[-1]["first_batch_seconds"] + history[-1]["seconds"]
    figures: dict[str, object] = {
        "first_step_seconds": history[0]["first_step_at"] - started,
        "later_epochs_first_batch_seconds": max(entry["first_batch_seconds"] for entry in history[1:]),
        "last_step_to_exit_seconds": ended - last,
        "workers": workers,
    }
    _report(figures, out)


def _report(figures: dict[str, object], out: str | None) -> None:
    for name, value in figures.items():
        typer.echo(f"{name:34} {value:.2f}" if isinstance(value, float) else f"{name:34} {value}")
    if out:
        Path(out).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    app()
