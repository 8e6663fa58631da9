"""kill -9 at twenty random moments of a training on two workers, resumed on one, two or three: every epoch trains on every
row once.

Ranks are gloo processes without Ray. Each appends the rows of every step to a file. What was trained after the state that the
next ranks resume from is not part of the model any more, and is taken out.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers.configs import simulated_table
from helpers.faults import Table, forking, half_written
from helpers.inline_tasks import inline_prepare
from helpers.ranks import RankContext
from helpers.runs import dataset_of
from recray.config import Config, parse_config
from recray.training import launch
from recray.training.phase import Phase
from recray.training.trainer import MicroBatches, Step, Trainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MOMENTS, EPOCHS = 20, 30
Row = tuple[int, int, int]  # epoch, user, item


def _config(folder: Path) -> Config:
    table = simulated_table(
        folder,
        events=1500,
        users=60,
        items=50,
        model={"name": "two_tower", "dim": 4, "hidden": [8], "dropout": 0.2},
        training={"epochs": EPOCHS, "global_batch_size": 48, "save_every": "2 steps"},
    )
    table["data"]["shard_events"] = 300
    return parse_config(table | {"scaling": {"num_workers": 2}})


def _phase(folder: Path) -> Phase:
    return Phase("train", EPOCHS, str(folder / "epochs"))


def _train(rank: int, world_size: int, folder: Path, attempt: int) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        store = f"file://{folder}/store-{attempt}"
        limit = timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=limit)
    config, train_step = _config(folder), Trainer.train_step
    log = os.open(folder / f"rows-{attempt:02d}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def noting(self: Trainer, micro: MicroBatches) -> Step:
        batches = [batch for batch, real in micro if real]
        rows = [[u, i] for b in batches for u, i in zip(b.user_B.tolist(), b.target_Q.tolist(), strict=True)]  # type: ignore[union-attr]
        at = [self.state.progress.epoch, self.state.progress.sums.steps]
        step = train_step(self, micro)
        os.write(log, (json.dumps([at, rows]) + "\n").encode())
        return step

    Trainer.train_step = noting  # type: ignore[method-assign]
    trainer = Trainer(config, dataset_of(config), _phase(folder), RankContext(rank, world_size))
    launch._resume(trainer.state, _phase(folder), trainer.context)
    progress = trainer.state.progress
    os.write(log, (json.dumps([[progress.epoch, progress.sums.steps], None]) + "\n").encode())
    trainer.fit()
    os._exit(0)


def _lines(folder: Path, attempt: int) -> list[tuple[tuple[int, int], list[list[int]] | None]]:
    """What the ranks of an attempt wrote: (epoch, step) and rows; None for where they resumed."""
    found = []
    for path in folder.glob(f"rows-{attempt:02d}-*"):
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # cut off by the kill
                at, rows = json.loads(line)
                found.append(((at[0], at[1]), rows))
    return found


def _start(folder: Path, workers: int, attempt: int) -> list[BaseProcess]:
    ranks: list[BaseProcess] = [
        forking().Process(target=_train, args=(rank, workers, folder, attempt)) for rank in range(workers)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def _kill_after(folder: Path, attempt: int, ranks: list[BaseProcess], lines: int, wait: float, first: int) -> bool:
    """Kill one rank, and then the others, once so many steps are done. False if they ended before."""
    deadline = time.monotonic() + 90
    while len(_lines(folder, attempt)) < lines:
        if all(rank.exitcode == 0 for rank in ranks):
            return False
        assert time.monotonic() < deadline and not any(rank.exitcode for rank in ranks)
        time.sleep(0.002)
    time.sleep(wait)
    pids = [rank.pid for rank in ranks if rank.pid is not None]
    for pid in [pids[first % len(pids)], *pids]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for rank in ranks:
        rank.join()
    return True


def test_every_row_of_every_epoch_once(tmp_path: Path, table: Table) -> None:
    config, draw = _config(tmp_path), random.Random(11)
    inline_prepare(config)
    trained: dict[tuple[int, int], list[Row]] = {}
    lost, killed, resumed_on = 0, 0, Counter[int]()
    for attempt in range(MOMENTS + 1):
        workers = 2 if attempt == 0 else draw.choice((1, 2, 3))
        resumed_on[workers] += 1
        ranks = _start(tmp_path, workers, attempt)
        if attempt < MOMENTS:
            killed += _kill_after(tmp_path, attempt, ranks, draw.randint(1, 60), draw.random() / 50, draw.randint(0, 2))
        for rank in ranks:
            rank.join(300)
            assert attempt < MOMENTS or rank.exitcode == 0
        lines = _lines(tmp_path, attempt)
        start = {at for at, rows in lines if rows is None}
        if not start:  # killed before it had resumed
            continue
        (begin,) = start
        gone = [at for at in trained if at >= begin]
        lost = max(lost, len(gone))
        for at in gone:
            del trained[at]
        for at, rows in lines:
            if rows is not None:
                trained.setdefault(at, []).extend((at[0], user, item) for user, item in rows)
    assert killed == MOMENTS and len(resumed_on) == 3, resumed_on
    wanted = Counter[Row]()
    for part in dataset_of(config).iter_tables("train"):
        for row in part.to_pylist():
            targets = row["item"][len(row["item"]) - row["num_targets"] :]
            wanted.update((epoch, row["user"], item) for epoch in range(EPOCHS) for item in targets)
    assert Counter(row for rows in trained.values() for row in rows) == wanted
    assert _phase(tmp_path).last_epoch() == EPOCHS and not half_written(tmp_path / "epochs")
    # At most one interval is lost, plus the steps taken while that save was being written.
    table.row(f"kill -9 at {MOMENTS} random moments, resumed on 1, 2 or 3 workers", f"at most {lost} steps", 0)
