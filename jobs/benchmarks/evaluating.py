"""CPU seconds of evaluate, index and recommend on a log of many users and items."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.figures import report
from benchmarks.processes import cpu_seconds

if TYPE_CHECKING:
    import numpy as np

_TASTES, _PER_USER = 200, 8  # groups of items, and how many of them a user has
_BASELINES = ["popularity", "recent_popularity", "rolling_popularity", "item_knn", "hindsight"]


def run(
    events: Annotated[int, typer.Option(help="of the log")] = 5_000_000,
    users: Annotated[int, typer.Option(help="of the log")] = 100_000,
    items: Annotated[int, typer.Option(help="of the log")] = 130_000,
    max_queries: Annotated[int, typer.Option(help="of evaluate; 0 = all")] = 0,
    folder: Annotated[str | None, typer.Option(help="keep the run here, and use what is in it")] = None,
    out: Annotated[str | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """User and system time of all processes for `evaluate` with every baseline, and for `recommend` to all users, after a
    training of a two_tower with 64 numbers an item that is as short as it can be. Quality means nothing here."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    import recray
    from recray.config import parse_config

    figures: dict[str, Any] = {"events": events, "users": users}
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(folder or temporary)
        home.mkdir(parents=True, exist_ok=True)
        if not (home / "log.parquet").exists():
            pq.write_table(pa.table(tastes(events, users, items)), home / "log.parquet")
        table = {
            "run": {"name": "evaluating", "output": f"{home}/runs"},
            "data": {
                "path": f"{home}/log.parquet",
                "columns": {"timestamp": "timestamp"},
                "timestamp_unit": "ms",
                "split": {"kind": "temporal", "valid": "1d", "test": "3d"},
            },
            "model": {"name": "two_tower", "dim": 64, "history_length": 20, "user_embedding": False},
            "loss": {"name": "bpr", "negatives": 4},
            "training": {"epochs": 1, "global_batch_size": 8192},
            "evaluation": {"baselines": _BASELINES} | ({"max_queries": max_queries} if max_queries else {}),
        }
        config = parse_config(table)
        for name in ("prepare", "train", "index", "evaluate"):
            figures |= _measured(name, lambda name=name: getattr(recray, name)(config))
        found = figures.pop("evaluate")
        figures |= {"catalogue": found.counts["catalogue"], "queries": found.counts["queries"]}
        figures |= _measured("recommend", lambda: recray.recommend(config, f"{home}/lists", k=100))
        for name in ("prepare", "train", "index", "recommend"):
            figures.pop(name)
    report(figures, out)


def _measured(name: str, work: Callable[[], object]) -> dict[str, Any]:
    before, started = cpu_seconds(), time.perf_counter()
    found = work()
    return {
        name: found,
        f"{name}_cpu_seconds": cpu_seconds() - before,
        f"{name}_seconds": time.perf_counter() - started,
    }


def tastes(events: int, users: int, items: int) -> dict[str, "np.ndarray"]:
    """Users of about 50 events each, some with hundreds, who choose from a few groups of items; items by Zipf's law."""
    import numpy as np

    rng = np.random.default_rng(0)
    share = rng.lognormal(0, 1, users)
    user = np.sort(rng.choice(users, events, p=share / share.sum()))
    taste = rng.integers(0, _TASTES, (users, _PER_USER))[user, rng.integers(0, _PER_USER, events)]
    size = items // _TASTES
    # Rank r of a group has the weight r ** -0.8, by inversion of its continuous form.
    rank = np.minimum((rng.random(events) * size**0.2) ** 5, size - 1).astype(np.int64)
    return {
        "user_id": user,
        "item_id": rank * _TASTES + taste,
        "timestamp": 1_700_000_000_000 + rng.integers(0, 30 * 86_400_000, events),
    }
