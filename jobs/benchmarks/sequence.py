"""SASRec against RecTools."""

import tempfile
from typing import Annotated

import typer

from benchmarks.figures import report
from benchmarks.peers import figures_of


def run(
    events: Annotated[str, typer.Option(help="ml-1m's events.parquet: user_id, item_id, timestamp (a position)")],
    peers: Annotated[str | None, typer.Option(help="folder of the peers' environments")] = None,
    rounds: Annotated[int, typer.Option(help="an epoch of each in turn; the fastest of each counts")] = 2,
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
            "training": {"epochs": 1, "global_batch_size": 128, "resume": False},
            "scaling": {"num_workers": 0},
        }
        config = parse_config(table)
        recray.prepare(config)
        ours, theirs = list[float](), list[float]()
        for _ in range(rounds):
            ours.append(recray.train(config).history[0]["seconds"])
            if peers:
                theirs += figures_of(peers, "rectools", "rectools_sasrec.py", events, "1")["seconds"]
    figures: dict[str, object] = {"recray_seconds": min(ours), "threads": torch.get_num_threads()}
    if peers:
        figures |= {"rectools_seconds": min(theirs), "speedup": min(theirs) / min(ours)}
        figures["speedup_by_round"] = ", ".join(f"{b / a:.2f}" for a, b in zip(ours, theirs, strict=True))
    report(figures, out)
