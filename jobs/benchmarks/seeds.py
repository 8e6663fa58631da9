"""Test metrics of a configuration over seeds, as README states them: each seed draws, trains and is evaluated anew."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.figures import report

if TYPE_CHECKING:
    from recray.records import ReportRecord

_JOBS = Path(__file__).parents[1]


def run(
    config: Annotated[str, typer.Argument(help="configuration, e.g. jobs/configs/ml-1m-din.toml")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, of all runs")] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="'NAME section.key=value section.key=value': another run on the same prepared data"),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="run.seed = 1, 2, ...")] = 3,
    at_once: Annotated[int, typer.Option(min=1, help="runs at a time; they share the cores")] = 1,
    folder: Annotated[str | None, typer.Option(help="keep the runs there, and reuse those that exist")] = None,
    out: Annotated[str | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """A shipped configuration, and variants of it, on several seeds: mean and standard deviation of every test metric,
    time and memory of a training. Runs without Ray, each in a process of its own."""
    variants = {"model": list[str]()}
    for one in variant or []:
        name, *keys = one.split()
        variants[name] = keys
    with tempfile.TemporaryDirectory() as temporary:
        runs = Runs(config, overrides or [], os.path.abspath(folder or temporary), at_once)
        with ThreadPoolExecutor(at_once) as pool:
            numbers = range(1, seeds + 1)
            list(pool.map(runs.prepare, numbers))
            done = {
                (name, n): pool.submit(runs.train, name, keys, n) for n in numbers for name, keys in variants.items()
            }
            results = {key: future.result().figures() for key, future in done.items()}
    figures: dict[str, object] = {"seeds": seeds, "commit": commit()}
    for name in variants:
        ours = [results[name, n] for n in numbers]
        for key in ours[0]:
            of_baseline = key.startswith("baseline")  # the same of every variant
            if not of_baseline or name == "model":
                values = [one[key] for one in ours]
                spread = f" +- {statistics.stdev(values):.4f}" if seeds > 1 else ""
                figures[key if of_baseline else f"{name} {key}"] = f"{statistics.mean(values):.4f}{spread}"
    report(figures, out)


@dataclass(frozen=True)
class Evaluated:
    """A run's report on the test split, and what its training took."""

    report: ReportRecord
    seconds: float
    megabytes: float

    def figures(self) -> dict[str, float]:
        """Test metrics of the model and of other systems by name, time and memory."""
        found = dict[str, float]()
        for system, metrics in self.report.metrics.items():
            prefix = {"model": "", "blended": "blended ", "index": "index ", "reranked": "reranked "}.get(
                system, f"baseline {system} "
            )
            found |= {f"{prefix}{metric}": value.value for metric, value in metrics.items()}
        return found | {"train_seconds": self.seconds, "train_peak_mb": self.megabytes}


class Runs:
    """<folder>/NAME-N is a run with seed N; <folder>/data-N holds what all runs of that seed are prepared from."""

    def __init__(self, config: str, overrides: list[str], folder: str, at_once: int) -> None:
        self._config, self._overrides, self._folder = config, overrides, folder
        self._threads = max(1, _cores() // at_once)

    def prepare(self, seed: int) -> None:
        self._stage("prepare", "data", seed, [])

    def train(self, name: str, keys: list[str], seed: int) -> Evaluated:
        """Train and evaluate a run, each in a separate process; artefacts that are up to date are read."""
        from recray.records import CheckpointRecord, ReportRecord

        megabytes = self._stage("train", name, seed, keys)
        self._stage("evaluate", name, seed, keys)
        run = f"{self._folder}/{name}-{seed}"
        report = ReportRecord.read(f"{run}/report/current")
        return Evaluated(report, CheckpointRecord.read(f"{run}/checkpoint/current").seconds, megabytes)

    def _stage(self, stage: str, name: str, seed: int, keys: list[str]) -> float:
        """The most MB of one stage, in a process of its own."""
        keys = [*self._overrides, *keys, f"run.output={self._folder}", f"run.name={name}-{seed}", f"run.seed={seed}"]
        keys += [f"run.dataset={self._folder}/data-{seed}", "scaling.num_workers=0"]
        keys += [f"scaling.threads_per_worker={self._threads}"]
        command = [sys.executable, "-m", "recray", stage, self._config, *(p for k in keys for p in ("--set", k))]
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(self._threads)})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        return usage.ru_maxrss / 1024


def _cores() -> int:
    """That this process may use; where the system does not say, all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str:
    command = ["git", "-C", str(_JOBS), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
