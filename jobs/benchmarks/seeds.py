"""Test metrics of a configuration over seeds, as README states them: each seed draws, trains and is evaluated anew."""

import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.figures import report

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
    folder: Annotated[str | None, typer.Option(help="keep the runs there, and go on from those that are there")] = None,
    out: Annotated[str | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """A shipped configuration, and variants of it, on several seeds: mean and standard deviation of every test metric,
    time and memory of a training. Runs without Ray, each in a process of its own."""
    variants = {"model": list[str]()}
    for one in variant or []:
        name, *keys = one.split()
        variants[name] = keys
    with tempfile.TemporaryDirectory() as temporary:
        runs = _Runs(config, overrides or [], os.path.abspath(folder or temporary), at_once)
        with ThreadPoolExecutor(at_once) as pool:
            numbers = range(1, seeds + 1)
            list(pool.map(runs.prepare, numbers))
            done = {
                (name, n): pool.submit(runs.train, name, keys, n) for n in numbers for name, keys in variants.items()
            }
            results = {key: future.result() for key, future in done.items()}
    figures: dict[str, object] = {"seeds": seeds, "commit": _commit()}
    for name in variants:
        ours = [results[name, n] for n in numbers]
        for key in ours[0]:
            of_baseline = key.startswith("baseline")  # the same of every variant
            if not of_baseline or name == "model":
                values = [one[key] for one in ours]
                spread = f" +- {statistics.stdev(values):.4f}" if seeds > 1 else ""
                figures[key if of_baseline else f"{name} {key}"] = f"{statistics.mean(values):.4f}{spread}"
    report(figures, out)


class _Runs:
    """<folder>/data-N is what seed N prepared, <folder>/NAME-N a run on it."""

    def __init__(self, config: str, overrides: list[str], folder: str, at_once: int) -> None:
        self._config, self._overrides, self._folder = config, overrides, folder
        self._threads = max(1, _cores() // at_once)

    def prepare(self, seed: int) -> None:
        if not Path(self._folder, f"data-{seed}", "dataset", "dataset.json").exists():
            self._stage("prepare", f"data-{seed}", seed, [])

    def train(self, name: str, keys: list[str], seed: int) -> dict[str, float]:
        """Test metrics of the run and its baselines, and what its training took."""
        from recray.records import CheckpointRecord, ReportRecord

        run = f"{name}-{seed}"
        shared = [*keys, f"run.dataset={self._folder}/data-{seed}/dataset"]
        megabytes = self._stage("train", run, seed, shared)
        self._stage("evaluate", run, seed, shared)
        systems = ReportRecord.read(f"{self._folder}/{run}/report/current").metrics
        figures = {metric: value.value for metric, value in systems.pop("model").items()}
        for system, metrics in systems.items():
            prefix = "" if system in ("blended", "index", "reranked") else "baseline "
            figures |= {f"{prefix}{system} {metric}": value.value for metric, value in metrics.items()}
        # Of the record: a run that was there is only read again.
        seconds = CheckpointRecord.read(f"{self._folder}/{run}/checkpoint/current").seconds
        return figures | {"train_seconds": seconds, "train_peak_mb": megabytes}

    def _stage(self, stage: str, run: str, seed: int, keys: list[str]) -> float:
        """The most MB of one stage, in a process of its own."""
        keys = [*self._overrides, *keys, f"run.output={self._folder}", f"run.name={run}", f"run.seed={seed}"]
        keys += ["scaling.num_workers=0", f"scaling.threads_per_worker={self._threads}"]
        command = [sys.executable, str(_JOBS / f"{stage}.py"), self._config, *(p for k in keys for p in ("--set", k))]
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(self._threads)})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        return usage.ru_maxrss / 1024


def _cores() -> int:
    """That this process may use; where the system does not say, all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _commit() -> str:
    command = ["git", "-C", str(_JOBS), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
