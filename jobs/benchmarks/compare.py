"""Whether this checkout still computes what another commit computes, to the last bit.

    python jobs/benchmark.py compare --base 4583b67
    python jobs/benchmark.py compare --base 4583b67 --only 'din*' --json build/compare.json

For the time when code moves and results must not. A list of small configurations (comparison/configurations.py), which
together use every model, loss and way to train, is run by the code of the base commit and by that of this checkout, as it
is in the working tree: in processes of their own with PYTHONPATH set to the checkout, with the same Python and the same
number of threads. Then the files that they left are compared: prepared tables, the loss of every optimizer step
(of one worker; of two the losses of epochs), history, weights, index, report and recommended lists.

A line a quantity says `identical`, or how many values differ and where; the exit status is 1 where anything differs.
What is not compared is named in comparison/adapter.py (times, ids, paths), and so is all that is known of how the two
checkouts differ: when a key or a folder is renamed, it is said there.
"""

import fnmatch
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.comparison import adapter
from benchmarks.comparison.child import NO_RAY
from benchmarks.comparison.configurations import Configuration, Run, all_configurations, filled, write_log
from benchmarks.comparison.differences import Outcome, points_by_setting
from benchmarks.figures import report

_JOBS = Path(__file__).parents[1]
_HERE = _JOBS.parent
_SEED = 3
_STARTS = 5  # of a process whose Ray does not come up in time


def run(
    base: Annotated[str | None, typer.Option(help="commit that this checkout is held against")] = None,
    base_folder: Annotated[str | None, typer.Option(help="a checkout of it that is there already, instead")] = None,
    here: Annotated[str, typer.Option(help="checkout that is held against it")] = str(_HERE),
    only: Annotated[list[str] | None, typer.Option(help="configurations, by name or pattern such as 'din*'")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="leave these out, by name or pattern")] = None,
    threads: Annotated[int, typer.Option(min=1, help="of every process's arithmetic")] = 1,
    share: Annotated[int, typer.Option(min=1, help="configurations that share a process, and its start")] = 5,
    at_once: Annotated[int, typer.Option(min=1, help="processes at a time")] = 2,
    folder: Annotated[str | None, typer.Option(help="keep runs and logs there; must not exist")] = None,
    out: Annotated[str | None, typer.Option("--json", help="write all that was found as JSON")] = None,
) -> None:
    """Bit for bit: steps, weights, indexes, reports and lists of this checkout against those of a commit."""
    if (base is None) == (base_folder is None):
        raise typer.BadParameter("give --base COMMIT, or --base-folder FOLDER")
    known = all_configurations()
    chosen = [one for one in known if _matches(one.name, only or ["*"]) and not _matches(one.name, skip or [])]
    if not chosen:
        raise typer.BadParameter(f"no configuration is left; there are {', '.join(one.name for one in known)}")
    started = time.perf_counter()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was begun is taken away
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary) if folder is None else Path(folder).absolute()
        if folder is not None:
            home.mkdir(parents=True)
        write_log(home / "log")
        with _checkout(base, base_folder, Path(temporary)) as of_base:
            sides = {"base": of_base, "here": Path(here).absolute()}
            found = dict(_outcomes(chosen, _Runner(home, sides, threads), share, at_once))
    flat = [outcome for outcomes in found.values() for outcome in outcomes]
    different = [outcome for outcome in flat if not outcome.identical]
    report(
        {
            "configurations": len(found),
            "quantities": len(flat),
            "values": sum(outcome.compared for outcome in flat),
            "quantities_that_differ": len(different),
            "seconds": time.perf_counter() - started,
            "threads": threads,
        },
        None,
    )
    if out:
        body = {name: [outcome.as_json() for outcome in outcomes] for name, outcomes in found.items()}
        Path(out).write_text(json.dumps({"base": base or base_folder, "configurations": body}, indent=2) + "\n")
    raise typer.Exit(1 if different else 0)


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


@contextmanager
def _checkout(commit: str | None, folder: str | None, temporary: Path) -> Iterator[Path]:
    """The base's code; a worktree of our own is removed afterwards."""
    if commit is None:
        assert folder is not None
        yield Path(folder).absolute()
        return
    place = temporary / "base"
    git = ["git", "-C", str(_HERE), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(place), commit], check=True)
    try:
        yield place
    finally:
        subprocess.run([*git, "remove", "--force", str(place)], check=True)


@dataclass(frozen=True)
class _Runner:
    """<home>/<configuration>/<side>/<run> is a run folder."""

    home: Path
    sides: Mapping[str, Path]  # "base", "here" -> checkout
    threads: int
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def stop(self) -> None:
        """End what still runs."""
        for process in self.processes:
            process.terminate()

    def make(self, configurations: list[Configuration], side: str) -> dict[str, Any]:
        """What one process of a checkout notes: by configuration steps of its runs, or the error that ended it."""
        name = f"{side}-{configurations[0].name}"
        spec_file, result, log = (self.home / f"{name}{end}" for end in (".spec.json", ".json", ".txt"))
        spec = {
            "checkout": str(self.sides[side]),
            "threads": self.threads,
            "result": str(result),
            "configurations": {one.name: [self._spec(one, run, side) for run in one.runs] for one in configurations},
        }
        spec_file.write_text(json.dumps(spec, indent=2))
        # -P: no folder but those of PYTHONPATH comes before the installed packages.
        command = [sys.executable, "-P", "-m", "benchmarks.comparison.child", str(spec_file)]
        for _ in range(_STARTS):
            for configuration in configurations:
                shutil.rmtree(self.output(configuration, side), ignore_errors=True)
                self.output(configuration, side).mkdir(parents=True)
            with log.open("w") as stream:
                streams: dict[str, Any] = {"stdout": stream, "stderr": subprocess.STDOUT, "cwd": self.home}
                process = subprocess.Popen(command, env=self._environment(side), **streams)
                self.processes.append(process)
                code = process.wait()
            if not code or NO_RAY not in log.read_text():
                break
        made = json.loads(result.read_text()) if result.exists() else {}
        last = "\n    ".join(log.read_text().splitlines()[-15:])
        lost = {"error": f"its process ended with {code}:\n    {last}"}
        return {one.name: made.get(one.name, lost) for one in configurations}

    def output(self, configuration: Configuration, side: str) -> Path:
        return self.home / configuration.name / side

    def _spec(self, configuration: Configuration, run: Run, side: str) -> dict[str, Any]:
        output = self.output(configuration, side)
        table = filled(run.table, {"log": str(self.home / "log"), "output": str(output)})
        table["run"] = {"name": run.name, "output": str(output), "seed": _SEED}
        table["scaling"] = {"num_workers": 1, "threads_per_worker": self.threads} | table.get("scaling", {})
        return {
            "name": run.name,
            "table": table,
            "workers": run.workers,
            "until": run.until,
            "retriever": run.retriever,
            "splits": run.splits,
            "lists": str(output / f"{run.name}-lists"),
        }

    def _environment(self, side: str) -> dict[str, str]:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(self.threads))
        path = os.pathsep.join((str(self.sides[side]), str(_JOBS)))
        kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        # Ray makes its workers give way to all else, and on a machine with other work they would hardly come to run.
        pinned = {"PYTHONHASHSEED": "0", "RAY_worker_niceness": "0"}
        return kept | threads | pinned | {"PYTHONPATH": path}


def _outcomes(
    chosen: list[Configuration], runner: _Runner, share: int, at_once: int
) -> Iterator[tuple[str, list[Outcome]]]:
    """What was found of each configuration, in order, printed as soon as both checkouts are done."""
    width = max(len(one.name) for one in chosen)
    groups = [chosen[at : at + share] for at in range(0, len(chosen), share)]
    with ThreadPoolExecutor(at_once) as pool:
        made = [[pool.submit(runner.make, group, side) for side in ("base", "here")] for group in groups]
        try:
            for group, futures in zip(groups, made, strict=True):
                base, here = (future.result() for future in futures)
                for one in group:
                    outcomes = _compared(one, base[one.name], here[one.name], runner)
                    for outcome in outcomes:
                        several = f"{outcome.run} " if len(one.runs) > 1 else ""
                        typer.echo(f"{one.name:{width}}  {several + outcome.quantity:24} {outcome.line()}")
                    yield one.name, outcomes
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            runner.stop()
            raise


def _compared(
    configuration: Configuration, base: Mapping[str, Any], here: Mapping[str, Any], runner: _Runner
) -> list[Outcome]:
    """base, here: what their processes noted."""
    errors = [f"{side}: {one['error']}" for side, one in (("base", base), ("here", here)) if "error" in one]
    if errors:
        return [Outcome(configuration.name, "all stages", error="\n    ".join(errors))]
    outcomes = []
    for run in configuration.runs:
        folders = [runner.output(configuration, side) for side in ("base", "here")]
        of_run = _Compared(run, *folders)
        if run.workers == 1:
            of_base, of_here = base[run.name], here[run.name]
            outcomes += [of_run.steps(of_base, of_here), of_run.epochs(of_base, of_here, configuration.ends_early)]
        outcomes += [of_run.looked_at(name) for name in of_run.quantities()]
    return outcomes


@dataclass(frozen=True)
class _Compared:
    """The results of one run by both checkouts."""

    run: Run
    base: Path  # output folders, which hold the run folder and the lists
    here: Path

    def quantities(self) -> list[str]:
        lists = ["index", "index tables", "index file"] if self.run.retriever else []
        reports = [f"report-{split}" for split in self.run.splits]
        shown = ["lists"] if self.run.retriever else []
        return ["dataset", "dataset tables", "checkpoint", "history", "weights", *lists, *reports, *shown]

    def steps(self, base: Mapping[str, Any], here: Mapping[str, Any]) -> Outcome:
        """The loss of every optimizer step, of a refit too, and its number of queries or rows."""
        outcome = Outcome(self.run.name, "steps", unit="losses")
        for key in ("loss", "events"):
            of_base, of_here = ([_number(step[key]) for step in one["steps"]] for one in (base, here))
            outcome.values(of_base, of_here, f"{key} of step")
        outcome.compared = len(base["steps"])
        return outcome

    def epochs(self, base: Mapping[str, Any], here: Mapping[str, Any], ends_early: bool) -> Outcome:
        """What was reported after every epoch, those after the best one too."""
        outcome = Outcome(self.run.name, "epochs").values(base["epochs"], here["epochs"], "epochs")
        trained, most = len(base["epochs"]), self.run.table["training"]["epochs"]
        if (trained < most) != ends_early:
            outcome.error = f"the base trained {trained} of {most} epochs, which is not what this configuration is for"
        return outcome

    def looked_at(self, quantity: str) -> Outcome:
        outcome = Outcome(self.run.name, quantity)
        try:
            stage, _, part = quantity.partition(" ")
            if stage == "lists":
                return self._lists(outcome)
            stage = "checkpoint" if stage in ("history", "weights") else stage
            (of_base, base), (of_here, here) = (
                adapter.artifact(folder / self.run.name, stage) for folder in (self.base, self.here)
            )
            if quantity == "weights":
                outcome.unit = "numbers"
                return outcome.tensors(adapter.weights(of_base), adapter.weights(of_here))
            if part == "tables":
                return self._tables(outcome, of_base, of_here)
            if part == "file":
                return self._file(outcome, of_base, of_here)
            if quantity == "history":
                return outcome.values(base["history"], here["history"], "history")
            if quantity == "checkpoint":
                base, here = ({k: v for k, v in one.items() if k != "history"} for one in (base, here))
            if quantity == "index":
                base, here = (one | {"curve": points_by_setting(one["curve"])} for one in (base, here))
            return outcome.values(base, here)
        except (LookupError, OSError) as error:
            outcome.error = f"{type(error).__name__}: {error}"
            return outcome

    def _lists(self, outcome: Outcome) -> Outcome:
        base, here = (_tables(folder / f"{self.run.name}-lists") for folder in (self.base, self.here))
        # How rows are spread over files is no result; which rows there are, is.
        return outcome.tables({"lists": _sorted(base)}, {"lists": _sorted(here)})

    def _tables(self, outcome: Outcome, base: Path, here: Path) -> Outcome:
        return outcome.tables(_tables(base), _tables(here))

    def _file(self, outcome: Outcome, base: Path, here: Path) -> Outcome:
        """The index as faiss wrote it."""
        outcome.unit = "bytes"
        import numpy as np

        files = [sorted(folder.rglob("*.faiss")) for folder in (base, here)]
        if [len(found) for found in files] != [1, 1]:
            raise LookupError(f"not one *.faiss each: {files}")
        of_base, of_here = ({"index": np.frombuffer(file.read_bytes(), np.uint8)} for (file,) in files)
        return outcome.tensors(of_base, of_here)


def _number(value: Any) -> Any:
    return float.fromhex(value) if isinstance(value, str) else value


def _tables(folder: Path) -> dict[str, Any]:
    """All Parquet files below, by relative name."""
    import pyarrow.parquet as pq

    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise LookupError(f"no Parquet file lies below {folder}")
    return {str(file.relative_to(folder)): pq.ParquetFile(file).read() for file in files}


def _sorted(tables: Mapping[str, Any]) -> Any:
    import pyarrow as pa

    return pa.concat_tables(list(tables.values())).sort_by([("user", "ascending"), ("rank", "ascending")])
