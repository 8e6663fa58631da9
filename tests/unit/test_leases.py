"""One process at a time writes to a place in an object store. The places here are local folders."""

import json
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from recray import leases, sealed
from recray.errors import StorageError

pytestmark = pytest.mark.timeout(30)
OTHER = {"holder": "process 1 on another-host", "token": "theirs", "renewed": 0}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, seconds in {"_RENEW": 0.05, "_DEAD": 1.0, "_SETTLE": 0.05, "_POLL": 0.02}.items():
        monkeypatch.setattr(leases, name, seconds)
    yield
    leases._lost.clear()


def test_it_is_renewed_and_given_back(tmp_path: Path) -> None:
    file = tmp_path / "a.lock"
    with leases.lease(str(tmp_path / "a"), 0):
        first = json.loads(file.read_text())
        assert first["holder"].endswith(f" on {platform.node()}")
        while json.loads(file.read_text())["renewed"] < 2:
            time.sleep(0.02)
        leases.check()
    assert not file.exists()


def test_a_holder_that_renews_is_named(tmp_path: Path) -> None:
    file, ended = tmp_path / "a.lock", threading.Event()
    file.write_text(json.dumps(OTHER))

    def renew() -> None:
        renewed = 0
        while not ended.wait(0.1):
            renewed += 1
            part = tmp_path / "part"
            part.write_text(json.dumps(OTHER | {"renewed": renewed}))
            part.replace(file)

    renewing = threading.Thread(target=renew)
    renewing.start()
    try:
        with (
            pytest.raises(StorageError, match="being written by process 1 on another-host: wait until"),
            leases.lease(str(tmp_path / "a"), 0.3),
        ):
            pass
    finally:
        ended.set()
        renewing.join()
    assert json.loads(file.read_text())["token"] == "theirs"


def test_a_holder_that_does_not_renew_has_died(tmp_path: Path) -> None:
    (tmp_path / "a.lock").write_text(json.dumps(OTHER))
    began = time.monotonic()
    with leases.lease(str(tmp_path / "a"), 0):
        assert time.monotonic() - began >= leases._DEAD


def test_a_process_of_this_machine_that_is_gone_is_not_waited_for(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    (tmp_path / "a.lock").write_text(json.dumps(OTHER | {"holder": f"process {gone.pid} on {platform.node()}"}))
    began = time.monotonic()
    with leases.lease(str(tmp_path / "a"), 0):
        assert time.monotonic() - began < leases._DEAD


def test_who_lost_it_writes_no_record(tmp_path: Path) -> None:
    file = tmp_path / "a.lock"
    with leases.lease(str(tmp_path / "a"), 0):
        sealed.write(str(tmp_path / "before.json"), {})
        while not leases._lost:  # a renewal that is under way may replace it once
            file.write_text(json.dumps(OTHER))
            time.sleep(0.05)
        with pytest.raises(StorageError, match="taken over by process 1 on another-host"):
            sealed.write(str(tmp_path / "after.json"), {})
    assert (tmp_path / "before.json").exists() and not (tmp_path / "after.json").exists()
    assert json.loads(file.read_text())["token"] == "theirs"  # not ours to delete
    leases.check()


def test_of_two_that_come_at_once_one_gets_it(tmp_path: Path) -> None:
    got, refused, both_tried = [], [], threading.Barrier(2, timeout=20)

    def hold() -> None:
        try:
            with leases.lease(str(tmp_path / "a"), 20):
                got.append(1)
                both_tried.wait()
        except StorageError as error:  # of one process: the second does not wait
            refused.append(str(error))
            both_tried.wait()

    holders = [threading.Thread(target=hold) for _ in range(2)]
    for holder in holders:
        holder.start()
    for holder in holders:
        holder.join()
    assert len(got) == len(refused) == 1
