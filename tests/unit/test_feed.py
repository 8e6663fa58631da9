"""The threads between shards and the loop: order, errors, and an end that leaves nothing behind."""

import threading
from collections.abc import Iterator

import pytest
import torch

from recray.loading import prefetch
from recray.loading.batch import Batch, Jagged
from recray.loading.prefetch import DeviceLoader, Prefetcher
from recray.training.console import Progress

CPU = torch.device("cpu")


def _batch(number: int) -> Batch:
    return Batch(user_B=torch.tensor([number]), history=Jagged(torch.zeros(0), torch.zeros(2, dtype=torch.int64)))


def _cut(tables: Iterator[int]) -> Iterator[tuple[Batch, bool]]:
    for table in tables:
        for part in range(3):
            yield _batch(3 * table + part), part < 2


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "recray-ahead"]


def test_batches_come_in_order_and_the_threads_end() -> None:
    with DeviceLoader(iter(range(20)), _cut, CPU) as prefetch:
        found = [(int(batch.user_B), real) for batch, real in prefetch]
    assert found == [(i, i % 3 < 2) for i in range(60)]
    assert prefetch.seconds().keys() == {"read", "cut", "copy"}
    assert not _threads()


def test_an_early_end_closes_what_is_read() -> None:
    closed = threading.Event()

    def endless() -> Iterator[int]:
        try:
            number = 0
            while True:
                yield number
                number += 1
        finally:
            closed.set()

    with pytest.raises(KeyboardInterrupt), DeviceLoader(endless(), _cut, CPU) as prefetch:
        next(prefetch)
        raise KeyboardInterrupt
    assert closed.is_set() and not _threads()


@pytest.mark.parametrize("stage", ["read", "cut"])
def test_an_error_is_raised_in_the_loop_after_the_batches_before_it(stage: str) -> None:
    def tables() -> Iterator[int]:
        yield 0
        if stage == "read":
            raise OSError("no disk")
        yield 1

    def cut(tables: Iterator[int]) -> Iterator[tuple[Batch, bool]]:
        yield from _cut(iter([next(tables)]))
        next(tables)
        raise OSError("no disk")

    with DeviceLoader(tables(), cut, CPU) as prefetch:
        assert [int(next(prefetch)[0].user_B) for _ in range(3)] == [0, 1, 2]
        for _ in range(2):  # and again for whoever asks again
            with pytest.raises(OSError, match="no disk"):
                next(prefetch)
    assert not _threads()


def test_a_slow_stage_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    progress = Progress("train", 2, 1, enabled=True)
    for read in (8.0, 16.0):
        progress.start_epoch(0)
        progress.step(0.0, 1.0, waited=0.0)
        progress.step(0.0, 1.0, waited=9.0)
        took = progress.end_epoch({"read": read, "cut": 1.0, "copy": 0.5})
    assert took["read_seconds"] == 8.0 and took["cut_seconds"] == 0.0
    (record,) = caplog.records
    assert record.recray_event == "slow_loader" and record.recray_values["slowest"] == "read"  # type: ignore[attr-defined]
    said = record.getMessage()
    assert said.count("the slowest stage is read (read 8.0 s, cut 1.0 s, copy 0.5 s)") == 1
    assert "scaling.reader = 'ray_data'" in said


def test_stopping_does_not_wait_for_a_reader_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "_SECONDS_TO_STOP", 0.0)
    released = threading.Event()

    def entries() -> Iterator[int]:
        released.wait()
        yield 1

    ahead = Prefetcher(entries(), 1)
    ahead.stop()
    assert list(ahead) == [] and list(ahead) == []
    released.set()
