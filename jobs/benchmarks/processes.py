"""CPU time and memory of this process and all that it started, from /proc."""

import os
import threading
import time
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


def tree() -> list[int]:
    """This process and its descendants that are alive."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return found


def cpu_seconds(pids: list[int] | None = None) -> float:
    """User and system time of processes since they began, that of children that ended included; without `pids` of the tree."""
    found = [_stat(pid) for pid in pids or tree()]
    return sum(int(field) for fields in found for field in fields[11:15]) / _TICK


def _stat(pid: int) -> list[str]:
    """Fields of /proc/<pid>/stat from the state on; empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def memory() -> tuple[int, int]:
    """Bytes of the tree (pages that several processes share are counted once), and of its largest process."""
    sizes = []
    for pid in tree():
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        sizes += [int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")]
    return sum(sizes), max(sizes, default=0)


class MemoryWatch:
    """Memory of the tree while the block runs, looked at every `seconds`, less often where looking takes long."""

    def __init__(self, seconds: float = 0.1) -> None:
        self._seconds = seconds
        self.times: list[float] = []  # seconds since 1970
        self.trees: list[int] = []  # bytes of all processes
        self.process = 0  # the most that one of them had

    def __enter__(self) -> "MemoryWatch":
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        pause = self._seconds
        while not self._ended.wait(pause):
            begun = time.perf_counter()
            tree, process = memory()
            # The kernel walks every page to answer: of gigabytes that must not take a core.
            pause = min(max(self._seconds, 5 * (time.perf_counter() - begun)), 1.0)
            self.times.append(time.time())
            self.trees.append(tree)
            self.process = max(self.process, process)

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def peak(self, begin: float = 0.0, end: float = float("inf")) -> int:
        """The most bytes of all processes between two times."""
        return max((tree for at, tree in zip(self.times, self.trees, strict=True) if begin <= at < end), default=0)
