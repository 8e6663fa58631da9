"""SASRec against RecTools."""

import tempfile
from typing import Annotated

import typer

from benchmarks.figures import report
from benchmarks.peers import figures_of


def run(
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
        "threads": torch.get_num_threads(),
    }
    if peers:
        theirs = figures_of(peers, "rectools", "rectools_sasrec.py", events, str(epochs))
        figures |= {"rectools_seconds": min(theirs["seconds"]), "speedup": min(theirs["seconds"]) / ours}
    report(figures, out)
