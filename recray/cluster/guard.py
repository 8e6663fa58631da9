"""End what a local Ray leaves behind when its driver is killed.

Ray's agents try for a minute to tell the head that their node has died, though the head has died with it, and a worker that
is just starting waits longer. A shell waits for the end of a pipe that only the driver holds, and ends them then.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

# First line: the name of Ray's session. Second line: "PID:START ..." of its agents. A third one says that Ray was shut down.
# Agents rename themselves, so they are known by pid and by the time of their start (field 22 of /proc/PID/stat), since
# another process may have the number by then. All other processes of Ray name the socket of their session's raylet until
# they work, and end when the raylet does. Brackets keep the pattern from finding the process that looks for it.
_END_THEM = r"""read -r session; read -r agents; read -r line && exit
[ -n "$session" ] || exit
for agent in $agents; do
    read -r stat </proc/${agent%:*}/stat || continue
    set -- ${stat##*)}
    [ "${20}" = "${agent#*:}" ] && kill -9 ${agent%:*}
done
for again in 1 2 3; do
    for file in $(grep -las -- "[/]$session/sockets/raylet" /proc/[0-9]*/cmdline); do
        pid=${file#/proc/}
        kill -9 ${pid%/cmdline}
    done
    sleep 1
done"""


class Guard:
    """Ends the Ray that this process starts when this process ends, however it ends. Linux only."""

    def __init__(self) -> None:
        """Before Ray's threads run: a process that has many does not fork well."""
        nowhere = subprocess.DEVNULL
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _END_THEM], stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, start_new_session=True
        )

    def watch(self, session: str) -> None:
        """Ray runs. session: the name of its session, which is that of its folder of temporary files."""
        found = _processes()
        raylets = {pid for pid, (parent, _) in found.items() if parent == os.getpid() and _name(pid) == "raylet"}
        agents = " ".join(f"{pid}:{began}" for pid, (parent, began) in found.items() if parent in raylets)
        self._write(f"{session}\n{agents}")

    def release(self) -> None:
        """Ray was shut down, or did not start."""
        self._write("\n\n")
        self._shell.communicate()

    def _write(self, text: str) -> None:
        assert self._shell.stdin is not None
        with contextlib.suppress(OSError):  # it was killed
            self._shell.stdin.write(f"{text}\n".encode())
            self._shell.stdin.flush()


def _processes() -> dict[int, tuple[int, str]]:
    """Process -> (its parent, clock ticks at which it started). Empty where there is no /proc."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # "pid (name) state parent ...": a name may hold spaces and brackets.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            found[int(entry.name)] = int(fields[1]), fields[19]
    return found


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""
