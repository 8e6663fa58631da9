"""More workers on the same machine: events/s with the same global batch (strong) and with the same batch a worker (weak)."""

import tempfile
from typing import Annotated, Any

import typer

from benchmarks.figures import report
from benchmarks.loader import MODELS


def run(
    workers: Annotated[list[int] | None, typer.Option(help="[default: 1 and 2]")] = None,
    events: Annotated[int, typer.Option(help="simulated events")] = 60_000,
    epochs: Annotated[int, typer.Option(help="of each; the first warms up, the fastest other counts")] = 3,
    model: Annotated[list[str] | None, typer.Option(help="[default: din and sasrec]")] = None,
    weak: Annotated[bool, typer.Option(help="the same batch a worker instead of the same global batch")] = False,
    out: Annotated[str | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """DIN and SASRec on Ray workers of one thread each."""
    import recray
    from recray.config import parse_config

    figures: dict[str, object] = {"global_batch": "grows" if weak else "same"}
    for name in model or list(MODELS):
        rates: dict[int, float] = {}
        with tempfile.TemporaryDirectory() as folder:
            for count in workers or [1, 2]:
                config = parse_config(_table(name, folder, events, epochs, count, weak))
                recray.prepare(config)
                history = recray.train(config).history
                rates[count] = max(entry["events_per_second"] for entry in history[1:])
                figures[f"{name}_{count}_events_per_second"] = rates[count]
        first = min(rates)
        figures |= {
            f"{name}_{count}_over_{first}": rate / rates[first] for count, rate in rates.items() if count != first
        }
    report(figures, out)


def _table(name: str, folder: str, events: int, epochs: int, workers: int, weak: bool) -> dict[str, Any]:
    tables = MODELS[name]
    batch = tables["training"]["global_batch_size"] * (workers if weak else 1)
    simulated = {"events": events, "users": max(10, events // 125), "items": 5000}
    return tables | {
        "run": {"name": name, "output": folder},
        "data": tables["data"] | {"source": "simulated", "simulated": simulated, "split": {"kind": "leave_last"}},
        "training": {"global_batch_size": batch, "epochs": epochs, "resume": False, "validate_every": epochs},
        "scaling": {"num_workers": workers, "threads_per_worker": 1},
    }
