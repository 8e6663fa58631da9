"""Prepare a log that has grown: from the last dataset (data.append), and from scratch."""

import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.figures import report
from benchmarks.ingest import globo
from benchmarks.processes import cpu_seconds

if TYPE_CHECKING:
    from recray.config import Config

_FILES = 10  # of the log before it grows


def run(
    events: Annotated[int, typer.Option(help="of the log before it grows")] = 5_000_000,
    out: Annotated[str | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """Seconds to prepare a log of globo's shape that has grown by 1, 10 and 100 % of later events, from the last dataset and
    from scratch, and how many events each reads from the log; core-seconds (user and system time of all processes) where no
    process of Ray has ended meanwhile, as after a shuffle.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    import recray

    columns = globo(2 * events)
    order = np.argsort(columns["timestamp"], kind="stable")
    log = pa.table(columns).take(pa.array(order))
    figures: dict[str, object] = {"events": events}
    with tempfile.TemporaryDirectory() as folder:
        clicks = f"{folder}/clicks"
        Path(clicks).mkdir()
        step = -(-events // _FILES)
        for number in range(_FILES):
            part = log.slice(number * step, min(step, events - number * step))
            pq.write_table(part, f"{clicks}/{number:02d}.parquet")
        base = recray.prepare(_config(folder, "grown", True))
        for percent in (1, 10, 100):
            pq.write_table(log.slice(events, events * percent // 100), f"{clicks}/{_FILES}.parquet")
            for name, append in (("append", True), ("scratch", False)):
                config = _config(folder, "grown" if append else "fresh", append)
                before, started = cpu_seconds(), time.perf_counter()
                record = recray.prepare(config)
                key = f"{percent}_percent_{name}"
                figures[f"{key}_seconds"] = time.perf_counter() - started
                used = cpu_seconds() - before
                if used > 0:
                    figures[f"{key}_core_seconds"] = used
                read = record.counts["events_read"]
                figures[f"{key}_events_read"] = read - (base.counts["events_read"] if append else 0)
                shutil.rmtree(f"{config.run_uri}/dataset/{record.identity}")
            grown, fresh = (figures[f"{percent}_percent_{name}_seconds"] for name in ("append", "scratch"))
            figures[f"{percent}_percent_append_over_scratch_seconds"] = grown / fresh  # type: ignore[operator]
    report(figures, out)


def _config(folder: str, name: str, append: bool) -> "Config":
    from recray.config import parse_config

    context = [f"c{number}" for number in range(6)]
    table = {
        "run": {"name": name, "output": f"{folder}/runs"},
        "data": {
            "path": f"{folder}/clicks",
            "append": append,
            "columns": {"timestamp": "timestamp", "context": context},
            "timestamp_unit": "ms",
            "context_features": {one: {"kind": "categorical"} for one in context},
            "split": {"kind": "temporal", "valid": "6h", "test": "6h"},
        },
    }
    return parse_config(table)
