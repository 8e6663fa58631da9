"""Benchmarks, every figure a ratio against something in the same run on the same machine.

    python jobs/benchmark.py sequence --events PATH/ml-1m/events.parquet --peers build/peers
    python jobs/benchmark.py ranking --events PATH/ml-1m/events.parquet --peers build/peers

Each peer runs in an environment of its own in that folder, which `python jobs/benchmark.py peers build/peers` makes.
"""

import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from recray.data.prepared import PreparedDataset

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


@app.callback()
def benchmarks() -> None:
    """One subcommand a benchmark."""


@app.command()
def sequence(
    events: Annotated[str, typer.Option(help="ml-1m's events.parquet: user_id, item_id, timestamp (a position)")],
    peers: Annotated[str | None, typer.Option(help="folder of the peers' environments")] = None,
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
    if peers:
        theirs = _peer(peers, "rectools", "rectools_sasrec.py", events, str(epochs))
        figures |= {"rectools_seconds": min(theirs["seconds"]), "speedup": min(theirs["seconds"]) / ours}
    _report(figures, out)


@app.command()
def ranking(
    events: Annotated[str, typer.Option(help="ml-1m's events.parquet: user_id, item_id, timestamp (a position)")],
    peers: Annotated[str | None, typer.Option(help="folder of the peers' environments")] = None,
    users: Annotated[int, typer.Option(help="only so many users, for a shorter run; 0 = all")] = 1500,
    batch_size: Annotated[int, typer.Option()] = 4096,
    out: Annotated[str | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """DIN (history 50, d 32, attention 64-32, tower 256-128, Adam 1e-3), one epoch: rows/s and test AUC, against torch-rechub and DeepCTR-Torch on the same rows."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    import torch

    import recray
    from recray.config import parse_config
    from recray.data.prepared import PreparedDataset

    with tempfile.TemporaryDirectory() as folder:
        log = pq.read_table(events, columns=["user_id", "item_id", "timestamp"])
        if users:
            log = log.filter(pc.is_in(log["user_id"], log["user_id"].unique().slice(0, users)))
        pq.write_table(log, f"{folder}/events.parquet")
        table = {
            "run": {"name": "ranking", "output": folder},
            "data": {
                "path": f"{folder}/events.parquet",
                "timestamp_unit": "order",
                "columns": {"timestamp": "timestamp"},
                "split": {"kind": "leave_last"},
                "min_history": 10,
                "negatives": {"per_positive": 1},
            },
            "model": {"name": "din", "dim": 32, "history_length": 50, "user_embedding": True},
            "training": {"epochs": 1, "global_batch_size": batch_size},
            "scaling": {"num_workers": 0},
        }
        config = parse_config(table)
        recray.prepare(config)
        dataset = PreparedDataset.open(f"{config.run_uri}/dataset")
        (epoch,) = recray.train(config).history
        figures: dict[str, object] = {
            "recray_rows_per_second": epoch["events_per_second"],
            "recray_auc": recray.evaluate(config).metrics["model"]["auc"].value,
            "rows": sum(shard.impressions for shard in dataset.record.shards["train"]),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        if peers:
            _write_arrays(dataset, config.model.history_length, folder)
            for name, script in (("rechub", "rechub_din.py"), ("deepctr", "deepctr_din.py")):
                theirs = _peer(peers, name, script, folder, str(batch_size))
                speedup = epoch["events_per_second"] / theirs["rows_per_second"]
                figures |= {f"{name}_{key}": value for key, value in theirs.items()} | {f"{name}_speedup": speedup}
    _report(figures, out)


def _write_arrays(dataset: "PreparedDataset", length: int, folder: str) -> None:
    """arrays.npz: all impressions of train and test in prepared order, histories padded at the left with 0."""
    import numpy as np

    from recray.batches import impressions

    arrays: dict[str, object] = {"items": dataset.record.num_items, "users": dataset.record.num_users}
    for split in ("train", "test"):
        tables = dataset.iter_tables(split)
        parts = [batch for table in tables for batch in impressions(table, 65_536, length)]
        arrays[f"history_{split}"] = np.concatenate([part.history.padded(length).numpy() for part in parts])
        arrays[f"user_{split}"] = np.concatenate([part.user_B.numpy() for part in parts])
        arrays[f"target_{split}"] = np.concatenate([part.target_Q.numpy() for part in parts])
        arrays[f"label_{split}"] = np.concatenate([part.label_Q.numpy() for part in parts])
    np.savez(f"{folder}/arrays.npz", **arrays)


_PEERS = {
    "rectools": ["rectools[torch]==0.19.0", "pyarrow<20"],
    "rechub": ["torch-rechub==0.9.0"],
    "deepctr": ["deepctr-torch==0.3.0", "requests", "scikit-learn"],
}


@app.command("peers")
def make_peers(folder: Annotated[str, typer.Argument(help="where environments are made, one a peer")]) -> None:
    """Install the peers, each into an environment of its own with the torch that recray has."""
    import torch

    for name, packages in _PEERS.items():
        home = Path(folder) / name
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        # torch first and alone: no later resolution may pick another build of it.
        for wanted in ([f"torch=={torch.__version__.split('+')[0]}"], packages):
            subprocess.run([str(home / "bin" / "pip"), "install", "--quiet", *wanted], check=True)
        typer.echo(f"{name:34} {home}")


def _peer(folder: str, name: str, script: str, *arguments: str) -> dict[str, Any]:
    """What a peer's script prints as its last line."""
    python, path = Path(folder) / name / "bin" / "python", Path(__file__).parent / "peers" / script
    done = subprocess.run([str(python), str(path), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


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
