"""Benchmarks, every figure a ratio against something in the same run on the same machine.

    python jobs/benchmark.py sequence --events ../shared/data/ml-1m/events.parquet --peer-python .venv-peers/bin/python

The peer runs in its own environment:  python3 -m venv .venv-peers
    .venv-peers/bin/pip install torch==2.13.0 && .venv-peers/bin/pip install 'rectools[torch]==0.19.0' 'pyarrow<20'
"""

import json
import platform
import subprocess
import tempfile
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
    figures = {
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
    for name, value in figures.items():
        typer.echo(f"{name:18} {value:.2f}" if isinstance(value, float) else f"{name:18} {value}")
    if out:
        Path(out).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    app()
