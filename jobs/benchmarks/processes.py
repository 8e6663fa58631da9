"""CPU time and memory of this process and all that it started, from /proc."""

import os
import threading
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


def cpu_seconds() -> float:
    """User and system time of the tree since each process began, that of children that ended included."""
    return sum(sum(int(field) for field in fields[11:15]) for pid in tree() if (fields := _stat(pid))) / _TICK


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


class PeakMemory:
    """The most memory that the tree had while the block ran, looked at ten times a second."""

    def __enter__(self) -> "PeakMemory":
        self.tree = self.process = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            tree, process = memory()
            self.tree, self.process = max(self.tree, tree), max(self.process, process)

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
