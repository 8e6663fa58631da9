"""One process at a time writes an artefact."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from helpers.small_run import small_config
from recray import locks, storage
from recray.artifacts import INDEX, Run
from recray.errors import StorageError

# Holds the lock of a folder until it is killed.
HOLDER = "import sys, time; from recray import locks\nwith locks.exclusive(sys.argv[1]): print('in', flush=True); time.sleep(600)"


def test_a_second_process_is_told_who_writes(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint" / "1a2b"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, env=environment
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"in\n"
        with (
            pytest.raises(StorageError, match=rf"1a2b is being written by process {other.pid} on .*: wait until"),
            locks.exclusive(str(folder), wait=0.5),
        ):
            pass
        ending = threading.Timer(0.5, other.send_signal, [signal.SIGKILL])
        ending.start()
        with locks.exclusive(str(folder)):  # waits until the kernel releases it
            ending.join()
    with locks.exclusive(str(folder)):
        storage.write_json(str(folder / "a.json"), 1)
    assert [path.name for path in folder.parent.iterdir()] == ["1a2b"]


def test_a_lock_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locks.exclusive(str(tmp_path / "a" / "b")):
        _ = 1 / 0
    assert not list(tmp_path.rglob("*.lock")) and not (tmp_path / "a").exists()
    with locks.exclusive(str(tmp_path / "a" / "b")):
        pass
    assert not list(tmp_path.rglob("*"))


def test_the_lock_of_one_folder_is_not_that_of_another(tmp_path: Path) -> None:
    with locks.exclusive(str(tmp_path / "run" / "a")), locks.exclusive(str(tmp_path / "run" / "b")):
        pass


def test_a_process_that_holds_it_is_refused_again(tmp_path: Path) -> None:
    folder = str(tmp_path / "run" / "a")
    with locks.exclusive(folder), pytest.raises(StorageError), locks.exclusive(folder):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_needs_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "makedirs", refuse)
    with locks.exclusive(str(tmp_path / "run" / "a")):
        pass


def test_publishing_deletes_what_a_killed_process_left(tmp_path: Path) -> None:
    run = Run(small_config(tmp_path))
    artifact = run.artifact(INDEX, ["checkpoint-1"])
    run.begin(artifact)
    root = Path(run.uri)
    (root / "current.json.0123abcd.part").touch()
    (root / "index" / "current.0123abcd.part").symlink_to(artifact.identity)
    (root / "current.json.mine.part").touch()
    run.publish(artifact)
    assert run.current() == {"index": artifact.identity}
    assert sorted(path.name for path in root.iterdir()) == ["current.json", "current.json.mine.part", "index"]
    assert sorted(path.name for path in (root / "index").iterdir()) == sorted([artifact.identity, "current"])


def test_half_written_files_of_an_artefact_are_deleted_and_nothing_else(tmp_path: Path) -> None:
    run = Run(small_config(tmp_path))
    artifact = run.artifact(INDEX, ["checkpoint-1"])
    with run.making(artifact) as needed:
        assert needed
    folder = Path(artifact.uri)
    kept = ["index.faiss", "mine.part", "index.faiss.1234.part", "identity.json"]
    for name in (*kept, "index.faiss.0123abcd.part", "identity.json.0123abcd.part"):
        (folder / name).touch()
    artifact.mark()
    with run.making(artifact) as needed:
        assert needed and not list(folder.parent.glob("*.0123abcd.part"))
    assert sorted(path.name for path in folder.parent.rglob("*") if path.is_file()) == sorted(kept)
