"""CPUs that this process may use, and how OpenMP's threads wait for each other.

libgomp, which torch, faiss and scikit-learn use, lets threads spin at the end of every parallel operation until the
last one arrives. Where another process holds a core, that one arrives late and all others burn their time slices:
steps of a small model take several times as long. Threads that sleep at once (OMP_WAIT_POLICY=PASSIVE) have to be woken
for every operation, which costs time on a quiet machine. So they spin, but not for long (figures: jobs/benchmarks/README.md,
`busy`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_SPINS = "30000"  # rounds of libgomp's waiting loop before a thread sleeps; its default is practically for ever
# OpenMP's own name, and what libgomp and LLVM's library read instead. Any of them that the user has set wins.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def bound_spinning() -> None:
    """Make OpenMP's threads of this process, and of those it starts, sleep when they have waited a moment.

    Only has an effect before the first library with OpenMP is loaded, so `import recray` calls it.
    """
    if not waiting():
        os.environ["GOMP_SPINCOUNT"] = _SPINS


def waiting() -> dict[str, str]:
    """The environment variables that say how threads wait, for processes that do not inherit them."""
    return {name: os.environ[name] for name in _WAITING if name in os.environ}


def available(root: str = "/") -> int:
    """CPUs that this process can use at a time: those that it may run on, at most the quota of its control group.

    root: where /proc and /sys are.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(math.ceil(quota) for quota in _quotas(Path(root)))]))


def _quotas(root: Path) -> Iterator[float]:
    """CPUs that this process's control groups allow, those above it included. A container or Kubernetes sets them."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        # v2 has one hierarchy without a name; in v1 the one of `cpu` counts.
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounted = root / "sys/fs/cgroup" / controllers
        own = PurePosixPath(path.lstrip("/"))
        # In a container, the group's path may be that of the host: what does not exist here is skipped.
        for group in {mounted / own, *(mounted / parent for parent in own.parents), mounted}:
            quota, period = _limit(group, v2=not controllers)
            if quota > 0 and period > 0:
                yield quota / period


def _limit(group: Path, v2: bool) -> tuple[float, float]:
    """Microseconds of CPU time in a period, and the period; 0 where there is no limit."""
    words = _read(group / "cpu.max").split() if v2 else [_read(group / f"cpu.cfs_{x}_us") for x in ("quota", "period")]
    try:
        quota, period = map(float, words)
    except ValueError:  # "max 100000", or no such file
        return 0.0, 0.0
    return quota, period


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
