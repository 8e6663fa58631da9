"""What Ray Tune adds to a trial, and what ending trials early saves."""

import tempfile
import time
from typing import Annotated, Any

import typer

from benchmarks.figures import report


def overhead(
    trials: Annotated[int, typer.Option(help="one-worker trials that train almost nothing")] = 12,
    concurrent: Annotated[int, typer.Option(help="of them at a time")] = 1,
    out: Annotated[str | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """Wall time of a search less what its trains took on their own, over the number of trials. Ray runs before."""
    import recray
    from recray.artifacts import CHECKPOINT, in_use
    from recray.config import parse_config
    from recray.tuning.store import sweep_uri

    with tempfile.TemporaryDirectory() as folder:
        table: dict[str, Any] = {
            "run": {"name": "overhead", "output": folder},
            "data": {"source": "simulated", "simulated": {"events": 1000, "users": 100, "items": 50}},
            "model": {"name": "two_tower", "dim": 4},
            "training": {"epochs": 1, "global_batch_size": 1024},
            "tune": {
                "scheduler": "none",
                "trials": trials,
                "top": 0,
                "concurrent": concurrent,
                "space": {"optim.learning_rate": {"low": 1e-3, "high": 1e-2}},
            },
        }
        config = parse_config(table)
        recray.prepare(config)
        started = time.perf_counter()
        record = recray.tune(config)
        wall = time.perf_counter() - started
        folders = [f"{sweep_uri(config)}/trials/{trial.number:04d}" for trial in record.trials]
        own = [in_use(folder, CHECKPOINT).record.seconds for folder in folders]
    figures: dict[str, object] = {
        "trials": len(own),
        "concurrent": concurrent,
        "search_seconds": wall,
        "own_training_seconds_a_trial": sum(own) / len(own),
        "added_seconds_a_trial": (wall * concurrent - sum(own)) / len(own),
    }
    report(figures, out)


def against_grid(
    events: Annotated[str, typer.Option(help="amazon-beauty's events.parquet")],
    users: Annotated[int, typer.Option(help="only so many users, for a shorter run; 0 = all")] = 0,
    epochs: Annotated[int, typer.Option(help="of a trial at most")] = 24,
    seeds: Annotated[int, typer.Option(help="on which both winners are trained again")] = 3,
    out: Annotated[str | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """A grid of 24 points of SASRec on amazon-beauty, once to the end and once under ASHA: best value and CPU hours."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    import recray
    from recray.config import parse_config

    figures: dict[str, object] = {"epochs": epochs, "users": users or "all"}
    with tempfile.TemporaryDirectory() as folder:
        log = pq.read_table(events, columns=["user_id", "item_id", "timestamp"])
        if users:
            log = log.filter(pc.is_in(log["user_id"], log["user_id"].unique().slice(0, users)))
        pq.write_table(log, f"{folder}/events.parquet")
        hours: dict[str, float] = {}
        for scheduler in ("none", "asha"):
            config = parse_config(_grid(folder, scheduler, epochs, seeds))
            started = time.perf_counter()
            record = recray.tune(config)
            wall = time.perf_counter() - started
            best = max(trial.best or 0.0 for trial in record.trials)
            used = sum(trial.seconds for trial in record.trials) / 3600  # of the search, each trial holds a core
            hours[scheduler] = used
            winner = record.finalists[0]
            name = {"none": "grid", "asha": "asha"}[scheduler]
            figures |= {
                f"{name}_best": f"{best:.4f}",
                f"{name}_winner": str(winner.values),
                f"{name}_winner_on_{seeds}_seeds": f"{winner.mean:.4f} +- {winner.std:.4f}",
                f"{name}_epochs": sum(trial.epochs for trial in record.trials),
                f"{name}_cpu_hours": f"{used:.4f}",
                f"{name}_wall_seconds_with_seeds": round(wall),
            }
    figures["asha_share_of_cpu_hours"] = hours["asha"] / hours["none"]
    report(figures, out)


def _grid(folder: str, scheduler: str, epochs: int, seeds: int) -> dict[str, Any]:
    return {
        "run": {"name": scheduler, "output": folder},
        "data": {
            "path": f"{folder}/events.parquet",
            "timestamp_unit": "order",
            "columns": {"timestamp": "timestamp"},
            "split": {"kind": "leave_last"},
        },
        "model": {"name": "sasrec", "layers": 1, "history_length": 50},
        # Sampled, for the grid is long.
        "loss": {"name": "sampled_softmax", "negatives": 512, "in_batch": False},
        "optim": {"schedule": "linear"},
        "training": {"epochs": epochs, "global_batch_size": 128},
        "scaling": {"num_workers": 0},
        "tune": {
            "search": "grid",
            "scheduler": scheduler,
            "grace_epochs": 2,
            "top": 1,
            "seeds": seeds,
            "space": {
                "model.dim": {"choices": [32, 64]},
                "optim.learning_rate": {"choices": [3e-4, 1e-3, 3e-3, 1e-2]},
                "model.dropout": {"choices": [0.2, 0.4, 0.6]},
            },
        },
    }
