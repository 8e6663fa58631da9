"""Runs the tests folder by folder, each in its own process: `python tests/run.py [--slow]`.

Unit tests come first, as many at a time as there are CPUs, and never import Ray; the tests on a local Ray, on clusters of several nodes and on a GPU follow.
At the end come the seconds of every folder and of the slowest modules, and one closing line for all of them. The exit
code is 1 when any part fails, crashes or exceeds its limit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

FOLDERS = ("unit", "ray", "cluster", "faults", "gpu")
TESTS = Path(__file__).parent
SLOWEST = 12  # modules listed
LIMIT, SLOW_LIMIT = 1800, 5400  # seconds for one folder; pytest-timeout bounds every test long before
NO_TESTS = 5  # pytest's exit code when the marker deselects everything


@dataclass
class Part:
    """One folder's outcome."""

    code: int
    seconds: float
    counts: Counter[str] = field(default_factory=Counter)  # passed, failed, errors, skipped
    modules: Counter[str] = field(default_factory=Counter)  # seconds, set-up of fixtures included


def main() -> int:
    slow = "--slow" in sys.argv[1:]
    start = time.monotonic()
    parts = {name: run(name, slow) for name in FOLDERS}
    report(parts)
    counts = sum((part.counts for part in parts.values()), Counter[str]())
    broken = [f"tests/{name} ended with code {p.code}" for name, p in parts.items() if p.code not in (0, 1, NO_TESTS)]
    words = [f"{counts[name]} {name}" for name in ("failed", "passed", "skipped", "errors") if counts[name]] + broken
    print(f"{', '.join(words)} in {time.monotonic() - start:.2f}s", flush=True)
    return int(any(part.code not in (0, NO_TESTS) for part in parts.values()) or not counts["passed"])


def run(name: str, slow: bool) -> Part:
    """pytest on one folder; its output passes through."""
    print(f"--- tests/{name}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", str(TESTS / name), "-m", "slow" if slow else "not slow"]
        environment = dict(os.environ)
        if name == "unit" and not slow:
            # Tests of a file stay together, since most files share something that takes seconds to make.
            command += ["-n", str(len(os.sched_getaffinity(0))), "--dist", "loadfile"]
            environment.setdefault("OMP_NUM_THREADS", "1")  # their models are small, and each process has one CPU
        start = time.monotonic()
        command.append(f"--junitxml={report}")
        process = subprocess.Popen(command, cwd=TESTS.parent, env=environment, start_new_session=True)
        try:
            code = process.wait(SLOW_LIMIT if slow else LIMIT)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            code = -signal.SIGKILL
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what the tests left running
            process.wait()
        part = Part(code, time.monotonic() - start)
        if report.exists():
            read(report, part)
    return part


def read(report: Path, part: Part) -> None:
    """Adds the counts and times of a JUnit report."""
    for suite in ElementTree.parse(report).iter("testsuite"):
        counts = {key: int(suite.get(key, 0)) for key in ("failures", "errors", "skipped")}
        part.counts["failed"] += counts["failures"]
        part.counts["errors"] += counts["errors"]
        part.counts["skipped"] += counts["skipped"]
        part.counts["passed"] += int(suite.get("tests", 0)) - sum(counts.values())
        for case in suite.iter("testcase"):
            part.modules[case.get("classname", "?")] += float(case.get("time", 0))  # type: ignore[assignment]


def report(parts: dict[str, Part]) -> None:
    modules = sum((part.modules for part in parts.values()), Counter[str]())
    print("--- seconds by module")
    for name, seconds in modules.most_common(SLOWEST):
        print(f"{seconds:8.1f}  {name}")
    print("--- seconds by folder, with imports")
    for name, part in parts.items():
        print(f"{part.seconds:8.1f}  tests/{name}")


if __name__ == "__main__":
    sys.exit(main())
