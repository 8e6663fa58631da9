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

import numpy as np
import typer

from benchmarks.figures import report


def run(
    config: Annotated[
        Path | None, typer.Option(help="configuration of a retriever; the built-in data without it")
    ] = None,
    rate: Annotated[float, typer.Option(help="requests a second")] = 200.0,
    seconds: Annotated[float, typer.Option(help="of each phase")] = 30.0,
    overload: Annotated[float, typer.Option(help="rate of the second phase over `rate`")] = 3.0,
    clients: Annotated[int, typer.Option(help="connections")] = 16,
    out: Annotated[str | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """POST /recommend for known users at a fixed rate, a promotion in the middle; then at a multiple of the rate.

    Requests are sent when they are due, whatever became of earlier ones, and timed from when they were due. The clients run
    on the same machine.
    """
    from recray.config import load_config
    from recray.inference import load

    path = config or Path(__file__).parents[1] / "configs" / "demo.toml"
    with tempfile.TemporaryDirectory() as output:
        overrides = [f"run.output={output}", "scaling.num_workers=0"]
        settings = load_config(str(path), overrides)
        arguments = [str(path), *(part for one in overrides for part in ("--set", one))]
        for verb in ("prepare", "train", "index"):
            _recray(verb, *arguments)
        _recray("promote", *arguments, "--force")
        other = [*arguments, "--set", "training.epochs=1"]  # what is promoted in the middle
        for verb in ("train", "index"):
            _recray(verb, *other)
        users = load(settings.run_uri).inputs.users.keys.to_pylist()
        port = 18_765
        command = [sys.executable, "-m", "recray", "--quiet", "serve", settings.run_uri]
        server = subprocess.Popen([*command, "--port", str(port), "--poll", "1"])
        try:
            _wait(port)
            swap = threading.Timer(seconds / 2, lambda: _recray("promote", *other, "--force"))
            swap.start()
            figures: dict[str, object] = {
                f"steady_{k}": v for k, v in _phase(port, users, rate, seconds, clients).items()
            }
            swap.join()
            hard = _phase(port, users, rate * overload, seconds, clients * 4)
            figures |= {f"overload_{k}": v for k, v in hard.items()}
        finally:
            server.terminate()
            server.wait()
    figures |= {"rate": rate, "overload": overload, "cores": os.cpu_count(), "load_before": os.getloadavg()[0]}
    report(figures, out)


def _recray(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "recray", "--quiet", *arguments], check=True, stdout=subprocess.DEVNULL)


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


def _phase(port: int, users: list[object], rate: float, seconds: float, clients: int) -> dict[str, object]:
    found: list[tuple[int, float, str]] = []
    begin = time.perf_counter() + 0.5

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        for at in range(number, int(rate * seconds), clients):
            due = begin + at / rate
            time.sleep(max(0.0, due - time.perf_counter()))
            body = json.dumps({"user": users[at * 7919 % len(users)], "k": 10})
            connection.request("POST", "/recommend", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            model = json.loads(text)["model"] if answer.status == 200 else ""
            found.append((answer.status, time.perf_counter() - due, model))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - begin
    good = np.array([took for status, took, _ in found if status == 200])
    percentiles = {f"p{q}_ms": round(1000 * float(np.percentile(good, q)), 1) for q in (50, 99)} if len(good) else {}
    return {
        "requests": len(found),
        "answered_a_second": round(len(good) / elapsed, 1),
        "shed": sum(status == 429 for status, _, _ in found),
        "errors": sum(status not in (200, 429) for status, _, _ in found),
        "models": len({model for status, _, model in found if status == 200}),
        **percentiles,
    }
