"""A worker that hangs in a step ends itself and says where; what is slow but comes is left alone."""

import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from unit.test_saving import KEYS, _phase
from unit.test_trainer import _config

from helpers.datasets import small_dataset
from helpers.ranks import RankContext, RankError, run_ranks
from recray.data.dataset import PreparedDataset
from recray.training import watchdog
from recray.training.trainer import MicroBatches, Step, Trainer
from recray.training.watchdog import Watchdog, stalled


def _wait(event: threading.Event) -> None:
    """Where a test hangs."""
    assert event.wait(30)


def test_a_step_that_hangs_ends_the_process_and_names_its_place(tmp_path: Path) -> None:
    ended = threading.Event()
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    dog = Watchdog(0.2, str(tmp_path), 3, end)
    with dog.watching():
        with dog.bounded("step 1 of epoch 1", first=True):
            time.sleep(0.5)
        dog._longest = 0.0
        with dog.bounded("step 2 of epoch 1"):
            _wait(ended)
    assert codes == [1]
    message = stalled(str(tmp_path))
    assert message.startswith("worker 3 on ") and "does not come: step 2 of epoch 1 has taken 0 s, at " in message
    assert stalled(str(tmp_path)) == "" and not list(tmp_path.iterdir())


def test_slow_steps_and_what_lies_between_them_are_not_bounded(tmp_path: Path) -> None:
    ended = threading.Event()
    dog = Watchdog(0.1, str(tmp_path), 0, lambda code: ended.set())
    with dog.watching():
        for number in range(2):
            with dog.bounded("step", first=number == 0):
                time.sleep(0.3)
            time.sleep(0.3)  # saving, validation
    assert not ended.is_set()


def test_all_that_do_not_come_are_named(tmp_path: Path) -> None:
    for rank in (1, 0):
        Watchdog(1, str(tmp_path), rank)._write(f"worker {rank} on a does not come")
    assert stalled(str(tmp_path)) == "worker 0 on a does not come; worker 1 on a does not come"
    assert stalled(str(tmp_path / "none")) == ""


class _Bounded(RankContext):
    def __init__(self, rank: int, world_size: int, folder: str) -> None:
        super().__init__(rank, world_size)
        self.watchdog = Watchdog(2.0, folder, rank)
        self.bounded = self.watchdog.bounded  # type: ignore[method-assign, assignment]


def _hang(rank: int, world_size: int, folder: str) -> None:
    """Rank 1 hangs in its fifth step."""
    watchdog._GRACE = 1000.0  # of the test; rank 0 must not be the one that ends
    config = _config(Path(folder), *KEYS, "scaling.num_workers=2")
    context = _Bounded(rank, world_size, folder)
    train_step = Trainer.train_step

    def step(self: Trainer, micro: MicroBatches) -> Step:
        if rank == 1 and self.state.progress.step == 4:
            threading.Event().wait()
        return train_step(self, micro)

    Trainer.train_step = step  # type: ignore[method-assign]
    with context.watchdog.watching():
        dist.barrier()
        Trainer(config, PreparedDataset.open(str(config.run.dataset)), _phase(Path(folder), config), context).fit()


def test_two_ranks_of_which_one_hangs_end_within_the_limit(tmp_path: Path) -> None:
    small_dataset(tmp_path / "data")
    started = time.monotonic()
    with pytest.raises(RankError, match="rank 1 exited with 1"):
        run_ranks(_hang, 2, str(tmp_path))
    assert time.monotonic() - started < 60
    message = stalled(str(tmp_path))
    assert message.startswith("worker 1 on ") and "does not come: step " in message and "of epoch" in message
    assert f"{threading.__file__}:" in message, sys.version
