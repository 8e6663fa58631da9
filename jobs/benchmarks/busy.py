"""A training step while other processes hold the cores, with OpenMP's threads spinning, sleeping, and as recray sets them."""

import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from benchmarks.figures import report

_SETTINGS = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "recray": {"GOMP_SPINCOUNT": "30000"},
}
# Steps of a two_tower (mean of a history of 20, two layers, softmax in the batch) of batches made before.
_STEP = """
import sys, time
import torch
from torch import nn

seconds, threads = float(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(threads)
items, tower = nn.Embedding(20_000, 64), nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
optimizer = torch.optim.AdamW([*items.parameters(), *tower.parameters()], lr=1e-3, fused=True)
histories, targets, label = torch.randint(20_000, (1024, 20)), torch.randint(20_000, (1024,)), torch.arange(1024)
times = []
while sum(times) < seconds or len(times) < 8:
    started = time.perf_counter()
    loss = nn.functional.cross_entropy(tower(items(histories).mean(1)) @ items(targets).T, label)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    times.append(time.perf_counter() - started)
print(" ".join(str(1000 * t) for t in times[3:]))
"""


def run(
    seconds: Annotated[float, typer.Option(help="of each measurement")] = 5.0,
    rounds: Annotated[int, typer.Option(help="alternating measurements of every setting")] = 3,
    loops: Annotated[int, typer.Option(help="busy processes; 0 = as many as cores")] = 0,
    out: Annotated[str | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """Median milliseconds of a two_tower step on a quiet machine and next to busy loops, by how threads wait."""
    cores = len(os.sched_getaffinity(0))
    figures: dict[str, object] = {"cores": cores, "load_before": os.getloadavg()[0]}
    for name, busy in (("quiet", 0), ("busy", loops or cores)):
        times: dict[str, list[float]] = {setting: [] for setting in _SETTINGS}
        with _loops(busy):
            for _ in range(rounds):
                for setting, variables in _SETTINGS.items():
                    times[setting] += _measure(variables, seconds, cores)
        figures |= {f"{name}_{setting}_ms": statistics.median(found) for setting, found in times.items()}
    report(figures, out)


def _measure(variables: dict[str, str], seconds: float, threads: int) -> list[float]:
    own = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
    environment = {name: value for name, value in os.environ.items() if name not in own} | variables
    command = [sys.executable, "-c", _STEP, str(seconds), str(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


@contextlib.contextmanager
def _loops(count: int) -> Iterator[None]:
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()
