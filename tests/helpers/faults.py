"""`recray` in child processes that faults are injected into, and what must be true afterwards."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import tomli_w
import torch
from safetensors.torch import load_file

from helpers.configs import simulated_table
from recray.config import Config, parse_config

_MARK = "RECRAY_TEST_CHILD"


@dataclass
class Child:
    """A command that runs in its own process and logs JSON lines to a file."""

    process: subprocess.Popen[bytes] | Forked
    output: Path
    mark: str
    began: float = field(default_factory=time.monotonic)

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def until(self, text: str, count: int = 1, seconds: float = 120.0) -> str:
        """Wait until `text` stands `count` times in its output, which is returned."""

        def there() -> bool:
            if self.process.poll() is not None and self.said().count(text) < count:
                raise AssertionError(f"ended with {self.process.returncode} before it said {text!r}: {self.said()}")
            return self.said().count(text) >= count

        wait_for(there, seconds, lambda: f"{text!r} in: {self.said()}")
        return self.said()

    def end(self, seconds: float = 120.0) -> tuple[int, str]:
        """Its exit code, and what it said."""
        try:
            return self.process.wait(seconds), self.said()
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {seconds} s: {self.said()}") from None

    def processes(self, name: str = "") -> list[int]:
        """Processes that it started, itself included, whose command line begins with `name`."""
        return [pid for pid, command in _processes(self.mark) if command.startswith(name)]

    def gone(self, seconds: float) -> float:
        """Wait until none of its processes is left; returns the seconds that took."""
        started = time.monotonic()
        wait_for(lambda: not self.processes(), seconds, lambda: f"still there: {_processes(self.mark)}")
        return time.monotonic() - started


@contextlib.contextmanager
def recray_child(config: Config, *words: str) -> Iterator[Child]:
    """`recray WORDS[0] CONFIG WORDS[1:]`. Everything that it started is ended after the block."""
    arguments, output, mark = _command(config, words)
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command, environment = [sys.executable, "-m", "recray", *arguments], os.environ | paths | {_MARK: mark}
    with output.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
    yield from _until_end(Child(process, output, mark))


@contextlib.contextmanager
def forked_child(config: Config, *words: str, before: Callable[[], None] | None = None) -> Iterator[Child]:
    """As `recray_child`, for a command without Ray, in a process that need not import torch again, which takes seconds.

    before: called in the child first.
    """
    arguments, output, mark = _command(config, words)
    output.touch()
    forked = forking().Process(target=_run_command, args=(arguments, output, mark, before))
    forked.start()
    yield from _until_end(Child(Forked(forked), output, mark))


def forking() -> Any:
    """Starts processes from one that has imported recray and torch."""
    server = multiprocessing.get_context("forkserver")
    stages = ("training.launch", "retrieval.build", "evaluation.recommend")
    server.set_forkserver_preload(["recray.cli", "torch.distributed", *(f"recray.{name}" for name in stages)])
    return server


def _command(config: Config, words: tuple[str, ...]) -> tuple[list[str], Path, str]:
    """Arguments of a command, the file for its output, and the mark of its processes."""
    assert config.run.dataset
    folder, mark = Path(config.run.dataset).parent, uuid.uuid4().hex  # not run.output, which may be a full disk
    file = folder / f"{mark}.toml"
    file.write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True, exclude_unset=True)))
    return ["--json", words[0], str(file), *words[1:]], folder / f"{mark}.txt", mark


def _run_command(arguments: list[str], output: Path, mark: str, before: Callable[[], None] | None) -> None:
    from recray import cli

    with output.open("ab", buffering=0) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.argv = ["recray", *arguments]
    if before is not None:
        before()
    cli.main()


def _until_end(child: Child) -> Iterator[Child]:
    try:
        yield child
    finally:
        for pid, _ in _processes(child.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if isinstance(child.process, Forked):
            child.process.kill()
        child.process.wait()


class Forked:
    """A process of multiprocessing as one of subprocess."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        assert process.pid is not None
        self.pid = process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("recray", timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def wait_for(true: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() >= deadline:
            raise AssertionError(f"not within {seconds} s: {what()}")
        time.sleep(0.05)


def config_of(folder: Path, name: str, *overrides: str) -> Config:
    """A training of some ten seconds on two workers, which saves every three steps. All runs share one dataset."""
    table = simulated_table(
        folder,
        events=3000,
        users=150,
        items=100,
        model={"name": "two_tower", "dim": 8, "hidden": [16], "dropout": 0.2},
        training={"epochs": 12, "global_batch_size": 256, "save_every": "3 steps"},
        evaluation={"bootstrap": 0},
    )
    table["run"] |= {"name": name, "dataset": str(folder / "dataset")}
    table["scaling"] = {"num_workers": 2, "reader": "worker", "threads_per_worker": 1}
    return parse_config(table, overrides)


def same_weights(a: Config, b: Config) -> bool:
    one, other = (load_file(f"{c.run_uri}/checkpoint/current/model.safetensors") for c in (a, b))
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def half_written(folder: Path | str) -> list[Path]:
    """Files that a writer that was interrupted has left."""
    return [path for path in Path(folder).rglob("*") if path.name.endswith((".part", ".lock"))]


def _processes(mark: str) -> list[tuple[int, str]]:
    """Pid and command line of every process with the mark in its environment that is not a zombie."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if f"{_MARK}={mark}".encode() in (entry / "environ").read_bytes():
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if command:
                    found.append((int(entry.name), command))
    return found


class Table:
    """The rows of tests/faults/README.md that were measured now."""

    def __init__(self) -> None:
        self.rows: list[str] = []

    def row(self, fault: str, lost: str, seconds: float) -> None:
        self.rows.append(f"| {fault} | {lost} | {seconds:.0f} |")
