"""What saving inside an epoch costs: how long training waits, and the steps while a save is written."""

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.embedding_table import _Trainer
from benchmarks.figures import report

_WARM_UP = 3  # steps
_DEFAULT = 600.0  # seconds: training.save_every = "10m"


def run(
    rows: Annotated[int, typer.Option(help="of the item table, 64 numbers each")] = 1_000_000,
    mode: Annotated[str, typer.Option(help="model.embedding.mode: dense, sparse_replicated or row_sharded")] = "dense",
    seconds: Annotated[float, typer.Option(help="of training that is measured")] = 90.0,
    every: Annotated[float, typer.Option(help="seconds between saves")] = 30.0,
    folder: Annotated[str | None, typer.Option(help="disk to write to; a temporary folder otherwise")] = None,
    out: Annotated[str | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """Steps of a two_tower with a large item table that is saved every 30 s, as the training loop does: share of the time that training is blocked, and milliseconds of a step while a save is written and otherwise."""
    with tempfile.TemporaryDirectory(dir=folder) as root:
        report(_measure(rows, mode, seconds, every, root), out)


def _measure(rows: int, mode: str, seconds: float, every: float, root: str) -> dict[str, object]:
    from recray.training.distributed import LocalContext, keep_memory
    from recray.training.optim import Ema
    from recray.training.phase import Phase
    from recray.training.saving import Saver
    from recray.training.state import TrainState

    keep_memory()
    trainer = _Trainer(mode, 0, 1, rows)
    model = trainer._objective.model
    state = TrainState(model, trainer._optimizer, trainer._scaler, Ema(model, 0.0))  # type: ignore[arg-type]
    saved: list[tuple[float, str]] = []

    def complete(folder: str, *_: object) -> None:
        saved.append((time.perf_counter(), folder))
        for _, old in saved[-3:-2]:
            shutil.rmtree(old)

    saver = Saver(state, LocalContext(), Phase("train", 1, root), f"{every:g}s", lambda: None, complete)  # type: ignore[arg-type, return-value]
    for _ in range(_WARM_UP):
        trainer.step()
    saver.restart_clock()
    quiet: list[float] = []  # seconds of steps
    writing: list[float] = []
    stalls: list[float] = []  # seconds that training waited, one per save
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        (writing if saver._write is not None else quiet).append(trainer.step()[0])
        state.progress.step += 1
        state.progress.sums.steps += 1
        blocked = saver.blocked
        saver.after_step(saver.flags(False))
        if saver.blocked > blocked:
            stalls.append(saver.blocked - blocked)
    total = time.perf_counter() - started
    saver.wait()
    size = sum(path.stat().st_size for path in Path(saved[-1][1]).iterdir())
    alone, during = statistics.median(quiet), statistics.median(writing)
    lost = sum(stalls) + sum(x - alone for x in writing)
    return {
        "rows": rows,
        "megabytes_a_save": size / 1e6,
        "saves": len(stalls),
        "blocked_milliseconds_first": 1000 * stalls[0],
        "blocked_milliseconds_later": 1000 * statistics.median(stalls[1:] or stalls),
        "blocked_percent": 100 * sum(stalls) / total,
        "blocked_percent_at_10m": 100 * statistics.median(stalls[1:] or stalls) / _DEFAULT,
        "step_milliseconds": 1000 * alone,
        "step_milliseconds_while_writing": 1000 * during,
        "steps_while_writing": len(writing),
        "lost_percent": 100 * lost / total,
        "lost_percent_at_10m": 100 * lost / len(stalls) / _DEFAULT,
    }
