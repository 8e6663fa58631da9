"""Whether the model waits for its data: steps/s of training against steps/s on batches that are there."""

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.figures import report

_FROZEN = 8  # batches
MODELS: dict[str, dict[str, Any]] = {
    "din": {
        "data": {"min_history": 10, "negatives": {"per_positive": 1}},
        "model": {"name": "din", "dim": 32, "history_length": 50},
        "training": {"global_batch_size": 4096},
    },
    "sasrec": {
        "data": {},
        "model": {"name": "sasrec", "dim": 64, "layers": 2, "history_length": 200, "dropout": 0.2},
        "loss": {"name": "softmax"},
        "training": {"global_batch_size": 128},
    },
}


def run(
    events: Annotated[int, typer.Option(help="simulated events")] = 60_000,
    repeats: Annotated[int, typer.Option(help="epochs of each, in turns; the fastest counts")] = 3,
    threads: Annotated[int, typer.Option(help="of the model; the loader has a core beside them")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    folder: Annotated[
        str | None,
        typer.Option(help="keep prepared data there, or use what another machine prepared: then Ray is not needed"),
    ] = None,
    out: Annotated[str | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """DIN and SASRec: steps/s of an epoch over steps/s of the same loop on 8 batches again and again, and how busy each
    stage of the loader is. Trains without Ray, so that it runs on a GPU machine too."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    import recray
    from recray.config import parse_config
    from recray.training import batches

    torch.set_num_threads(threads)
    real, figures = batches.DeviceLoader, dict[str, object]()
    for name, tables in MODELS.items():
        with tempfile.TemporaryDirectory() as temporary:
            simulated = {"events": events, "users": max(10, events // 125), "items": 5000}
            table = tables | {
                "run": {"name": name, "output": temporary, "dataset": f"{folder or temporary}/{name}-{events}"},
                "data": tables["data"]
                | {"source": "simulated", "simulated": simulated, "split": {"kind": "leave_last"}},
                "training": tables["training"] | {"epochs": 1, "resume": False},
                "scaling": {"num_workers": 0, "use_gpu": device == "cuda"},
            }
            config = parse_config(table)
            if not any(Path(str(config.run.dataset)).glob("*/dataset.json")):
                recray.prepare(config)
            entries: dict[str, list[dict[str, float]]] = {"training": [], "frozen": []}
            for _ in range(repeats):
                for kind, feed in (("training", real), ("frozen", _Frozen)):
                    batches.DeviceLoader = feed  # type: ignore[misc, assignment]
                    entries[kind] += recray.train(config).history
            batches.DeviceLoader = real  # type: ignore[misc]
        seconds = {kind: min(e["seconds"] - e["first_batch_seconds"] for e in es) for kind, es in entries.items()}
        best = min(entries["training"], key=lambda e: e["seconds"])
        figures[f"{name}_efficiency"] = seconds["frozen"] / seconds["training"]
        figures[f"{name}_epoch_seconds"] = seconds["training"]
        figures |= {
            f"{name}_{stage}_share": best[f"{stage}_seconds"] / best["seconds"] for stage in ("read", "cut", "copy")
        }
        figures[f"{name}_waiting_share"] = best["waiting_share"]
    report(figures | {"threads": threads, "device": device}, out)


class _Frozen:
    """The first batches of an epoch, again and again, and the last; all are there before the epoch begins."""

    def __init__(self, tables: Iterator[Any], cut: Callable[..., Iterator[Any]], device: Any) -> None:
        made = [(batch.to(device), real) for batch, real in cut(tables)]
        self._batches = itertools.chain(itertools.islice(itertools.cycle(made[:_FROZEN]), len(made) - 1), made[-1:])

    def __enter__(self) -> "_Frozen":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __next__(self) -> Any:
        return next(self._batches)

    def seconds(self) -> dict[str, float]:
        return {"read": 0.0, "cut": 0.0, "copy": 0.0}
