"""End what a local Ray leaves behind when its driver is killed.

Ray's agents try for a minute to tell the head that their node has died, though the head has died with it. A shell waits for
the end of a pipe that only the driver holds, and ends them then.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

# A second line says that Ray was shut down. The name is looked at since another process may have the number by then.
_END_THEM = """read -r agents; read -r line && exit
for pid in $agents; do read -r name </proc/$pid/comm && case $name in ray::*) kill -9 $pid;; esac; done"""


class Guard:
    """Ends the agents of the Ray that this process starts when this process ends, however it ends. Linux only."""

    def __init__(self) -> None:
        """Before Ray's threads run: a process that has many does not fork well."""
        nowhere = subprocess.DEVNULL
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _END_THEM], stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, start_new_session=True
        )

    def watch(self) -> None:
        """Ray runs."""
        parents = _parents()
        raylets = {pid for pid, parent in parents.items() if parent == os.getpid() and _name(pid) == "raylet"}
        self._write(" ".join(str(pid) for pid, parent in parents.items() if parent in raylets))

    def release(self) -> None:
        """Ray was shut down."""
        self._write("\n")
        self._shell.communicate()

    def _write(self, text: str) -> None:
        assert self._shell.stdin is not None
        with contextlib.suppress(OSError):  # it was killed
            self._shell.stdin.write(f"{text}\n".encode())
            self._shell.stdin.flush()


def _parents() -> dict[int, int]:
    """Process -> its parent. Empty where there is no /proc."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # "pid (name) state parent ...": a name may hold spaces and brackets.
            found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    return found


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""
