"""DIN against torch-rechub and DeepCTR-Torch."""

import os
import statistics
import tempfile
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.figures import report
from benchmarks.peers import figures_of

if TYPE_CHECKING:
    from recray.config import Config
    from recray.data.dataset import PreparedDataset


def run(
    events: Annotated[str, typer.Option(help="ml-1m's events.parquet: user_id, item_id, timestamp (a position)")],
    peers: Annotated[str | None, typer.Option(help="folder of the peers' environments")] = None,
    users: Annotated[int, typer.Option(help="only so many users, for a shorter run; 0 = all")] = 1500,
    batch_size: Annotated[int, typer.Option()] = 4096,
    rounds: Annotated[int, typer.Option(help="of an epoch of each; the median counts")] = 3,
    out: Annotated[str | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """DIN (history 50, d 32, attention 64-32, tower 256-128, Adam 1e-3), one epoch: rows/s and test AUC, against torch-rechub and DeepCTR-Torch on the same rows.

    recray trains before and after each epoch of a peer, which is held against the mean of both: the machine's speed
    may change from minute to minute. Then once more as a Ray worker a core with a thread each, which share the batch.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    import recray
    from recray.config import parse_config
    from recray.data.dataset import PreparedDataset

    cores = os.cpu_count() or 1
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
            "training": {"epochs": 1, "global_batch_size": batch_size, "resume": False},
            "scaling": {"num_workers": 0},
        }
        config = parse_config(table)
        recray.prepare(config)
        dataset = PreparedDataset.open(f"{config.run_uri}/dataset/current")
        figures: dict[str, object] = {
            "rows": sum(shard.impressions for shard in dataset.record.shards["train"]),
            "cores": cores,
        }
        scripts = {"rechub": "rechub_din.py", "deepctr": "deepctr_din.py"} if peers else {}
        if peers:
            _write_arrays(dataset, config.model.history_length, folder)
        spread = parse_config(table | {"scaling": {"num_workers": cores, "threads_per_worker": 1}})
        rates: dict[str, list[float]] = {"recray": [_rate(config)], "recray_workers": []}
        for _ in range(rounds):
            for name, script in scripts.items():
                theirs = figures_of(peers or "", name, script, folder, str(batch_size))
                rates["recray"].append(_rate(config))
                rates["recray_workers"].append(_rate(spread))
                rates.setdefault(name, []).append(theirs["rows_per_second"])
                ours = {"speedup": statistics.harmonic_mean(rates["recray"][-2:])}
                ours["speedup_of_workers"] = rates["recray_workers"][-1]
                for key, rate in ours.items():
                    rates.setdefault(f"{name}_{key}", []).append(rate / theirs["rows_per_second"])
                figures[f"{name}_auc"] = theirs["auc"]
        if not scripts:
            rates["recray_workers"].append(_rate(spread))
        figures["recray_auc"] = recray.evaluate(config).metrics["model"]["auc"].value
        for name, found in rates.items():
            key = name if "speedup" in name else f"{name}_rows_per_second"
            figures[key] = statistics.median(found)
            figures[f"{key}_all"] = ", ".join(f"{one:,.2f}" for one in found)
    report(figures, out)


def _rate(config: "Config") -> float:
    """Rows/s of an epoch."""
    import recray

    return recray.train(config).history[0]["events_per_second"]


def _write_arrays(dataset: "PreparedDataset", length: int, folder: str) -> None:
    """arrays.npz: all impressions of train and test in prepared order, histories padded at the left with 0."""
    import numpy as np

    from recray.loading.collate import impressions

    arrays: dict[str, object] = {"items": dataset.record.num_items, "users": dataset.record.num_users}
    for split in ("train", "test"):
        tables = dataset.iter_tables(split)
        parts = [batch for table in tables for batch in impressions(table, 65_536, length)]
        arrays[f"history_{split}"] = np.concatenate([part.history.padded(length).numpy() for part in parts])
        arrays[f"user_{split}"] = np.concatenate([part.user_B.numpy() for part in parts])
        arrays[f"target_{split}"] = np.concatenate([part.target_Q.numpy() for part in parts])
        arrays[f"label_{split}"] = np.concatenate([part.label_Q.numpy() for part in parts])
    np.savez(f"{folder}/arrays.npz", **arrays)
