"""Saving inside an epoch: what is consumed, resuming bit for bit, other numbers of workers, damaged states, stopping."""

import contextlib
import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from unit.test_trainer import _config

from helpers.datasets import small_dataset
from helpers.ranks import RankContext, run_ranks
from recray import storage
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.errors import Interrupted
from recray.loading.sampler import ShardGroup, ShardSlice, epoch_order, num_rows, remaining, share
from recray.records import CheckpointRecord
from recray.training import checkpoint, interrupt, launch
from recray.training.batches import TrainingData
from recray.training.distributed import LocalContext
from recray.training.phase import Phase, Position
from recray.training.trainer import MicroBatches, Step, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

KEYS = ("model.hidden=[8]", "model.dropout=0.3", "optim.schedule=linear", "optim.ema_decay=0.8", "training.epochs=3")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """These models are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# What is consumed ----------------------------------------------------------------------------------------------------


def _rows(slices: list[ShardSlice]) -> list[tuple[int, int]]:
    return [(one.shard, row) for one in slices for row in range(one.start, one.stop)]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    starts=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 20)), max_size=8),
    last=st.integers(1, 6),
)
def test_every_row_is_consumed_once_whatever_the_numbers_of_workers(
    sizes: list[int], starts: list[tuple[int, int]], last: int
) -> None:
    """starts: number of workers, and rows that each takes, of the trainings that are interrupted."""
    shards = [ShardGroup((str(number),), 0, size, 0) for number, size in enumerate(sizes)]
    whole = epoch_order(shards, 7, 3, "events")
    consumed: list[tuple[int, int]] = []
    for number, (workers, taken) in enumerate(starts):
        rest = remaining(whole, starts[:number])
        for rank in range(workers):
            consumed += _rows(share(rest, rank, workers))[:taken]
    rest = remaining(whole, starts)
    consumed += [row for rank in range(last) for row in _rows(share(rest, rank, last))]
    assert sorted(consumed) == [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(1, 200), workers=st.integers(1, 5), first=st.integers(0, 20), second=st.integers(0, 20))
def test_the_same_number_of_workers_continues_where_it_was(size: int, workers: int, first: int, second: int) -> None:
    whole = epoch_order([ShardGroup(("a",), 0, size, 0), ShardGroup(("b",), 0, size // 2, 0)], 1, 0, "events")
    if first + second > num_rows(whole) // workers:
        return  # a worker has run out of rows
    assert remaining(whole, [(workers, first), (workers, second)]) == remaining(whole, [(workers, first + second)])
    for rank in range(workers):
        rest = share(remaining(whole, [(workers, first)]), rank, workers)
        assert _rows(rest) == _rows(share(whole, rank, workers))[first:]


# Resuming ------------------------------------------------------------------------------------------------------------


class StopAfter:
    """Asks training to stop after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


def _fit(config: Config, phase: Phase, stop: Any = lambda: False, context: Any = None) -> Trainer:
    """Resume from the newest state and train, as launch does."""
    context = context or LocalContext()
    trainer = Trainer(config, PreparedDataset.open(str(config.run.dataset)), phase, context, stop)
    launch._resume(trainer.state, phase, context)
    trainer.fit()
    return trainer


def _phase(folder: Path, config: Config) -> Phase:
    return Phase("train", config.training.epochs, str(folder))


def _weights(phase: Phase) -> dict[str, Tensor]:
    return load_file(f"{phase.folder(phase.epochs)}/model.safetensors")


def _numbers(record: CheckpointRecord) -> list[dict[str, float]]:
    """The history without times."""
    return [{k: x for k, x in e.items() if k in ("epoch", "loss", record.metric)} for e in record.history]


@pytest.mark.parametrize("half_life", [False, True])
@pytest.mark.parametrize("model", ["two_tower", "sasrec", "din"])
def test_training_that_is_stopped_at_any_steps_ends_bit_for_bit_as_an_undisturbed_one(
    tmp_path: Path, model: str, half_life: bool
) -> None:
    small_dataset(tmp_path / "data", labelled=model == "din", timed=half_life)
    keys = KEYS if model != "sasrec" else KEYS[1:]
    if model == "sasrec" or half_life:  # an epoch has one row a user, or the rows that are sampled
        keys = (*keys, "training.global_batch_size=4")
    keys = (*keys, "training.half_life=2s") if half_life else keys
    config = _config(tmp_path, *keys, "training.accumulation_steps=2", model=model)
    whole, broken = _phase(tmp_path / "whole", config), _phase(tmp_path / "broken", config)
    _fit(config, whole)
    generator = torch.Generator().manual_seed(5)
    stops = 0
    while broken.last_epoch() < config.training.epochs:
        try:
            _fit(config, broken, StopAfter(int(torch.randint(1, 6, (), generator=generator))))
        except Interrupted:
            stops += 1
    assert stops >= 2
    a, b = _weights(whole), _weights(broken)
    assert all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())
    records = [CheckpointRecord.read(phase.folder(phase.epochs)) for phase in (whole, broken)]
    assert _numbers(records[0]) == _numbers(records[1])
    assert (records[0].step, records[0].rows) == (records[1].step, records[1].rows)


def test_saves_by_steps_leave_the_two_newest_states_and_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_dataset(tmp_path / "data")
    config = _config(tmp_path, *KEYS)
    saving = _config(tmp_path, *KEYS, "training.save_every=1 steps")
    plain, often = _phase(tmp_path / "plain", config), _phase(tmp_path / "often", config)
    _fit(config, plain)
    written: dict[str, tuple[int, int]] = {}
    save = checkpoint.save_record

    def note(folder: str, record: CheckpointRecord, *rest: Any) -> CheckpointRecord:
        written[folder] = (record.epoch, record.step)
        return save(folder, record, *rest)

    monkeypatch.setattr(checkpoint, "save_record", note)
    steps = _fit(saving, often).data.steps
    # A record tells the state that was copied, not the one that training has reached when it is written.
    positions = [(epoch, step) for epoch in range(4) for step in range(steps + 1)]
    wanted = {often.folder(epoch, step): (epoch, epoch * steps + step) for epoch, step in positions}
    assert len(written) > 3 and written == {folder: wanted[folder] for folder in written}
    a, b = _weights(plain), _weights(often)
    assert all(torch.equal(a[name], b[name]) for name in a)
    best = CheckpointRecord.read(often.folder(3)).best_epoch
    assert often.saved()[0] == Position(3) and len(often.saved()) == (3 if best < 3 else 2)
    # A save waits for the one before it, so not every step has one.
    assert often.saved()[1].epoch == 2


def test_a_damaged_state_is_named_and_the_one_before_it_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small_dataset(tmp_path / "data")
    config = _config(tmp_path, *KEYS)
    whole, broken = _phase(tmp_path / "whole", config), _phase(tmp_path / "broken", config)
    steps = _fit(config, whole).data.steps
    with pytest.raises(Interrupted, match="step 2 of epoch 2 is saved"):
        _fit(config, broken, StopAfter(steps + 2))
    for name in ("model.safetensors", "state.pt", "items.safetensors", "dataset.json"):
        file = Path(broken.folder(1, 2), name)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 16
        file.write_bytes(data)
        caplog.clear()
        assert launch._newest_intact(broken) == Position(1)
        assert f"{name} is damaged" in caplog.text and "step 2 of epoch 2" in caplog.text
        data[len(data) // 2] ^= 16
        file.write_bytes(data)
    assert launch._newest_intact(broken) == Position(1, 2)
    Path(broken.folder(1, 2), "state.pt").unlink()
    _fit(config, broken)
    a, b = _weights(whole), _weights(broken)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_write_that_fails_ends_training_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_dataset(tmp_path / "data")
    config = _config(tmp_path, *KEYS, "training.save_every=1 steps")

    def full(folder: str, state: Any) -> None:
        if "-step-" in folder:
            raise OSError("no space")

    monkeypatch.setattr("recray.training.checkpoint.save_state", full)
    with pytest.raises(OSError, match="no space"):
        _fit(config, _phase(tmp_path / "epochs", config))


# Several workers -----------------------------------------------------------------------------------------------------


def _train_ranks(rank: int, world_size: int, folder: str, steps: int) -> list[tuple[int, int, int]]:
    """Train until `steps` steps are done; returns (epoch, user, item) of all rows that this rank trained on."""
    config = _config(Path(folder), *KEYS, "scaling.num_workers=2")
    rows: list[tuple[int, int, int]] = []
    original = Trainer.train_step

    def noting(self: Trainer, micro: MicroBatches) -> Step:
        for batch, real in micro:
            if real:
                assert batch.target_Q is not None
                epoch = self.state.progress.epoch
                rows.extend((epoch, u, i) for u, i in zip(batch.user_B.tolist(), batch.target_Q.tolist(), strict=True))
        return original(self, micro)

    phase = Phase("train", config.training.epochs, f"{folder}/epochs")
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Interrupted):
        patch.setattr(Trainer, "train_step", noting)
        _fit(config, phase, StopAfter(steps), RankContext(rank, world_size))
    return rows


def test_any_numbers_of_workers_train_on_every_row_of_every_epoch_once(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "data")
    rows: Counter[tuple[int, int, int]] = Counter()
    for workers, steps in ((2, 3), (3, 4)):
        for found in run_ranks(_train_ranks, workers, str(tmp_path), steps):
            rows.update(found)
    rows.update(_train_ranks(0, 1, str(tmp_path), 1000))
    wanted: Counter[tuple[int, int, int]] = Counter()
    for table in dataset.iter_tables("train"):
        for row in table.to_pylist():
            targets = row["item"][len(row["item"]) - row["num_targets"] :]
            wanted.update((epoch, row["user"], item) for epoch in range(3) for item in targets)
    assert rows == wanted


class CountingContext(LocalContext):
    """One of several workers, whose sums are of what it counts alone."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size
        self.counted: list[Tensor] = []

    def sum(self, values: Tensor) -> Tensor:
        self.counted.append(values.clone())
        return torch.ones_like(values)


@pytest.mark.parametrize("workers", [2, 3, 7])
def test_workers_count_each_shard_of_a_half_life_once(tmp_path: Path, workers: int) -> None:
    """What is sampled of a shard is arithmetic on (seed, epoch, shard) and this number, which one worker counts for all."""
    dataset = small_dataset(tmp_path / "data", timed=True)
    shards = dataset.record.shards | {"train": dataset.record.shards["train"] * 5}
    dataset = replace(dataset, record=dataset.record.model_copy(update={"shards": shards}))
    config = _config(tmp_path, "training.half_life=2s")
    total = torch.zeros(5, dtype=torch.int64)
    for rank in range(workers):
        context = CountingContext(rank, workers)
        data = TrainingData(config, dataset, _phase(tmp_path, config), "events", context)
        assert data.rows == 5
        total += context.counted[0]
    # Each of 12 users has targets that are 1 to 6 seconds old: 12 * sum of 0.5 ** (age / 2) is 25.3.
    assert total.tolist() == [25] * 5


# Signals -------------------------------------------------------------------------------------------------------------


def test_a_signal_saves_and_a_second_one_stops_at_once(tmp_path: Path) -> None:
    small_dataset(tmp_path / "data")
    config = _config(tmp_path, *KEYS)
    phase = _phase(tmp_path / "epochs", config)
    before = signal.getsignal(signal.SIGTERM)

    class Terminate(interrupt.StopRequest):
        def __call__(self) -> bool:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__()

    with pytest.raises(SystemExit) as stopped, interrupt.graceful():
        with interrupt.polled(), pytest.raises(Interrupted, match="step 1 of epoch 1 is saved"):
            _fit(config, phase, Terminate(None))
        assert interrupt.received() == signal.SIGTERM
        with interrupt.polled():
            os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before and phase.saved() == [Position(0, 1)]


@pytest.mark.parametrize("became", [None, RuntimeError("the wait was broken off"), SystemExit(1)], ids=str)
def test_a_signal_ends_a_stage_with_its_code_whatever_it_became(became: BaseException | None) -> None:
    """Ray turns what a handler raises during its waits into errors of its own."""
    for number, ends in ((signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)):
        with pytest.raises(ends) as stopped, interrupt.graceful():
            try:
                os.kill(os.getpid(), number)
            except KeyboardInterrupt:
                if became is None:
                    raise
                raise became from None
        assert number == signal.SIGINT or stopped.value.code == 143


def test_the_file_of_a_driver_stops_its_workers(tmp_path: Path) -> None:
    request = interrupt.StopRequest(str(tmp_path))
    request._looked -= 10
    assert not request()
    with interrupt.graceful(), interrupt.forwarded(str(tmp_path)):
        os.kill(os.getpid(), signal.SIGTERM)
        assert not request(), "it looks every two seconds"
        request._looked -= 10
        assert request()
        assert not interrupt.StopRequest(str(tmp_path), rank=1)(), "worker 0 tells the others"
    assert not storage.exists(str(tmp_path / "stop"))
