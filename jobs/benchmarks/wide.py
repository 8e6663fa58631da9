"""DLRM on a log of the shape of Criteo's: 26 categories and 13 numbers a row."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.figures import report
from benchmarks.processes import MemoryWatch

if TYPE_CHECKING:
    import numpy as np

_CATEGORIES, _NUMBERS = 26, 13
_FILE_ROWS = 500_000
_ROWS_PER_USER = 50
_ITEMS = 20_000

_CONFIG = """
[run]
name = "wide"
output = "{folder}"

[data]
path = "{folder}/log/"
drop_duplicates = false

[data.columns]
timestamp = "timestamp"
label = "label"
context = {columns}

[data.context_features]
{features}

[data.split]
valid = 0.02
test = 0.02

[model]
name = "dlrm"
dim = 16
hidden = [256, 128]
bottom = [64]
history = "none"
history_length = 1

[training]
epochs = 1
global_batch_size = 8192

[evaluation]
bootstrap = 0
"""


def run(
    rows: Annotated[int, typer.Option(help="simulated rows")] = 10_000_000,
    workers: Annotated[int, typer.Option(help="training workers on Ray; 0 = without Ray")] = 1,
    folder: Annotated[str | None, typer.Option(help="keep log and run there; a log that is there is used")] = None,
    out: Annotated[str | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """DLRM from Parquet, one epoch: rows/s, AUC against that of the true probabilities, and memory as it streams:
    the peak over the second half of training by that over its first half (1.0 = flat)."""
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(folder or temporary)
        oracle = _write_log(home / "log", rows)
        names = [f"c{i}" for i in range(_CATEGORIES)] + [f"x{i}" for i in range(_NUMBERS)]
        kinds = [f'c{i} = {{ kind = "categorical", min_count = 4 }}' for i in range(_CATEGORIES)]
        kinds += [f'x{i} = {{ kind = "numeric", scale = "log" }}' for i in range(_NUMBERS)]
        path = home / "wide.toml"
        path.write_text(_CONFIG.format(folder=home, columns=names, features="\n".join(kinds)))
        report(_stages(path, home, rows, workers) | {"true_probabilities_auc": oracle}, out)


def _stages(path: Path, home: Path, rows: int, workers: int) -> dict[str, object]:
    from recray.records import CheckpointRecord, ReportRecord

    figures: dict[str, object] = {"rows": rows, "workers": workers}
    for stage in ("prepare", "train", "evaluate"):
        command = [sys.executable, str(Path(__file__).parents[1] / f"{stage}.py"), str(path)]
        started = time.perf_counter()
        with MemoryWatch(1.0) as watch:
            subprocess.run([*command, "--set", f"scaling.num_workers={workers}"], check=True)
        figures[f"{stage}_seconds"] = time.perf_counter() - started
        figures[f"{stage}_peak_mb"] = watch.peak() / 2**20
        if stage == "train":
            epoch = CheckpointRecord.read(f"{home}/wide/checkpoint/current").history[0]
            begin, seconds = epoch["first_step_at"], epoch["seconds"]
            # Buffers fill in the first tenth, which is left out.
            first = watch.peak(begin + 0.1 * seconds, begin + 0.55 * seconds)
            second = watch.peak(begin + 0.55 * seconds, begin + seconds)
            figures |= {
                "rows_per_second": epoch["events_per_second"],
                "waiting_share": epoch["waiting_share"],
                "memory_second_half_over_first": second / first,
            }
    figures["test_auc"] = ReportRecord.read(f"{home}/wide/report/current").metrics["model"]["auc"].value
    return figures


def _write_log(folder: Path, rows: int) -> float:
    """Parquet files of clicks drawn from a logistic model of all columns. Returns the AUC of the true probabilities."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from sklearn.metrics import roc_auc_score

    folder.mkdir(parents=True, exist_ok=True)
    auc = 0.0
    for number, start in enumerate(range(0, rows, _FILE_ROWS)):
        columns, probability = _rows(min(_FILE_ROWS, rows - start), rows, number)
        auc = float(roc_auc_score(columns["label"], probability))
        file = folder / f"part-{number:05d}.parquet"
        if not file.exists():
            pq.write_table(pa.table(columns), file, compression="zstd")
    return auc


def _rows(count: int, rows: int, number: int) -> tuple[dict[str, "np.ndarray"], "np.ndarray"]:
    """One file's columns and the true probability of each click. Files follow each other in time."""
    import numpy as np

    rng, world = np.random.default_rng([1, number]), np.random.default_rng(0)
    columns: dict[str, np.ndarray] = {
        "user_id": rng.integers(0, max(rows // _ROWS_PER_USER, 1), count),
        "item_id": (_ITEMS * rng.random(count) ** 3).astype(np.int64),
        "timestamp": 1_700_000_000 + np.sort(rng.integers(0, 86_400, count)) + 86_400 * number,
    }
    logit = np.full(count, -1.2)
    for i in range(_CATEGORIES):
        size = int(10 ** (1 + 5 * i / (_CATEGORIES - 1)))  # 10 to a million values, few of them frequent
        effect = world.normal(0, 0.25, size).astype(np.float32)
        columns[f"c{i}"] = (size * rng.random(count) ** 4).astype(np.int32)
        logit += effect[columns[f"c{i}"]]
    for i, weight in enumerate(world.normal(0, 0.15, _NUMBERS)):
        columns[f"x{i}"] = rng.lognormal(0, 1, count).astype(np.float32)
        logit += weight * np.log1p(columns[f"x{i}"])
    probability = 1 / (1 + np.exp(-logit))
    columns["label"] = (rng.random(count) < probability).astype(np.int8)
    return columns, probability


if __name__ == "__main__":
    typer.run(run)
