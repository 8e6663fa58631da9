"""Requests a second and times of `recray serve` on this machine: at a rate, with a swap in the middle, and in overload."""

import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.figures import report
from benchmarks.processes import cpu_seconds

_LOAD = Path(__file__).with_name("load.py")
# Weights do not change how long an answer takes: one epoch of few steps. Both models share one dataset.
_FAST = ("scaling.num_workers=0", "training.epochs=1", "training.global_batch_size=1024", "training.refit=false")
_DATA = ("data.negatives.per_positive=1", "data.negatives.draw=targets", "data.min_history=0")


def run(
    config: Annotated[
        Path | None, typer.Option(help="configuration of a retriever; the built-in data without it")
    ] = None,
    ranker: Annotated[Path | None, typer.Option(help="configuration of a ranker for 100 candidates a request")] = None,
    override: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of both, such as data.items")] = None,
    rate: Annotated[float, typer.Option(help="requests a second")] = 200.0,
    seconds: Annotated[float, typer.Option(help="of each phase")] = 30.0,
    overload: Annotated[float, typer.Option(help="rate of the second phase over `rate`")] = 3.0,
    clients: Annotated[int, typer.Option(help="connections")] = 256,
    out: Annotated[str | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """POST /recommend for known users at a fixed rate, a promotion in the middle; then at a multiple of the rate.

    Requests are sent when they are due, whatever became of earlier ones, and timed from when they were due. The client
    runs in a separate process on the same machine.
    """
    from recray import promote
    from recray.config import load_config
    from recray.inference import load

    path = config or Path(__file__).parents[1] / "configs" / "demo.toml"
    with tempfile.TemporaryDirectory() as output:
        shared = [f"run.output={output}", f"run.dataset={output}/dataset", *_FAST, *(override or [])]
        shared += _DATA if ranker else ()
        first = [*shared, "run.name=served", "retrieval.item_knn_weight=0", "retrieval.k=100"]
        _recray("prepare", path, first)
        if ranker:
            _recray("train", ranker, [*shared, "run.name=ranker"])
            first.append(f"retrieval.ranker={output}/ranker")
        other = [*first, "optim.learning_rate=5e-4"]  # what is promoted in the middle
        for overrides in (first, other):
            _recray("train", path, overrides)
            _recray("index", path, overrides)
        before, after = (load_config(str(path), one) for one in (first, other))
        promote(before, force=True)
        keys = Path(output) / "users.json"
        keys.write_text(json.dumps(load(before.run_uri).inputs.users.keys.to_pylist()))
        port = 18_765
        command = [sys.executable, "-m", "recray", "--quiet", "serve", before.run_uri]
        server = subprocess.Popen([*command, "--port", str(port), "--poll", "1"])
        figures: dict[str, object] = {"rate": rate, "overload": overload, "cores": os.cpu_count()}
        try:
            _wait(port)
            _phase(server.pid, port, rate / 4, 3, 16, keys)  # buffers and caches
            swap = threading.Timer(seconds / 2, lambda: promote(after, force=True))
            swap.start()
            steady = _phase(server.pid, port, rate, seconds, clients, keys)
            swap.join()
            hard = _phase(server.pid, port, rate * overload, seconds, clients, keys)
        finally:
            server.terminate()
            server.wait()
    figures |= {f"steady_{name}": value for name, value in steady.items()}
    report(figures | {f"overload_{name}": value for name, value in hard.items()}, out)


def _recray(verb: str, path: Path, overrides: list[str]) -> None:
    options = [part for one in overrides for part in ("--set", one)]
    subprocess.run(
        [sys.executable, "-m", "recray", "--quiet", verb, str(path), *options], check=True, stdout=subprocess.DEVNULL
    )


def _wait(port: int) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the server did not start within 120 s")


def _phase(server: int, port: int, rate: float, seconds: float, clients: int, keys: Path) -> dict[str, object]:
    before, load = cpu_seconds([server]), os.getloadavg()[0]
    command = [sys.executable, str(_LOAD), *map(str, (port, rate, seconds, clients, keys))]
    found: dict[str, object] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    used = cpu_seconds([server]) - before
    return found | {"server_cpu_ms": round(1000 * used / (rate * seconds), 2), "load_before": load}
