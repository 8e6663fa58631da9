"""Peak memory and time of prepare and training as the log grows."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.figures import report
from benchmarks.processes import MemoryWatch

_EVENTS_PER_USER = 50


def run(
    rows: Annotated[list[int] | None, typer.Option(help="simulated events [default: 1000000 and 10000000]")] = None,
    out: Annotated[str | None, typer.Option(help="write the figures as JSON")] = None,
    stage: Annotated[str | None, typer.Option(hidden=True)] = None,
    config: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """A light `two_tower` on simulated logs over 20,000 items: peak memory of all processes (shared pages once) and seconds, of
    prepare and of one training epoch without Ray. The model is the same for all logs; users are not in it."""
    if stage is not None and config is not None:
        return _stage(stage, config)
    figures: dict[str, object] = {}
    counts = rows or [1_000_000, 10_000_000]
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            table = {
                "run": {"name": "memory", "output": folder},
                "data": {
                    "source": "simulated",
                    "simulated": {"events": count, "users": count // _EVENTS_PER_USER, "items": 20_000},
                },
                # A step that costs little, so that a hundred million rows are read and cut in minutes.
                "model": {"name": "two_tower", "dim": 16, "history_length": 10, "user_embedding": False},
                "loss": {"name": "bpr", "negatives": 16},
                "training": {"epochs": 1, "global_batch_size": 8192},
                "scaling": {"num_workers": 0, "threads_per_worker": 1},
            }
            path = Path(folder) / "config.json"
            path.write_text(json.dumps(table))
            for name in ("prepare", "train"):
                figures |= {f"{count}_{name}_{key}": value for key, value in _measured(name, str(path)).items()}
    first = counts[0]
    for count in counts[1:]:
        for name in ("prepare", "train"):
            for key in ("peak_mb", "seconds"):
                ratio = float(str(figures[f"{count}_{name}_{key}"])) / float(str(figures[f"{first}_{name}_{key}"]))
                figures[f"{name}_{key}_{count}_over_{first}"] = ratio
    report(figures, out)


def _measured(stage: str, config: str) -> dict[str, float]:
    """The stage in a process of its own, so that no stage begins with another's memory."""
    command = [sys.executable, str(Path(__file__).parents[1] / "benchmark.py"), "memory", "--stage", stage]
    started = time.perf_counter()
    with MemoryWatch() as watch:
        subprocess.run([*command, "--config", config], check=True)
    seconds = time.perf_counter() - started
    return {"peak_mb": watch.peak() / 2**20, "largest_process_mb": watch.process / 2**20, "seconds": seconds}


def _stage(stage: str, config: str) -> None:
    import recray
    from recray.config import parse_config

    parsed = parse_config(json.loads(Path(config).read_text()))
    if stage == "prepare":
        recray.prepare(parsed)
    else:
        recray.train(parsed)
