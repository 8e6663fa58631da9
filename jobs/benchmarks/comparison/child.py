"""What one checkout makes of some configurations: `python -m benchmarks.comparison.child SPEC.json` in a fresh process.

The process imports `recray` from the checkout that PYTHONPATH names and uses its public functions only, but for the
progress display, whose `step` is told the loss of every optimizer step.
"""

import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from benchmarks.comparison.adapter import KEYS, PROGRESS, VALUES

# Ray gives a node 30 seconds to start, which a machine with other work may not have.
NO_RAY = "The current node timed out during startup"


def main(spec: Mapping[str, Any]) -> None:
    """Make all runs of every configuration, and write what was noted: steps and seconds of each run, or its error."""
    # Some code asks for the machine's cores instead of what it may use.
    os.cpu_count = lambda: spec["threads"]
    import recray

    _check_checkout(recray.__file__, spec["checkout"])
    steps: list[dict[str, Any]] = []
    _listen(steps)
    results: dict[str, Any] = {}
    for name, runs in spec["configurations"].items():
        print(f"--- {name}", flush=True)
        results[name] = {}
        try:
            for run in runs:
                steps.clear()
                noted = _make(recray, run, spec["checkout"])
                if run["workers"] == 1 and not steps:
                    raise RuntimeError("no step was seen: which class does training tell its steps? (adapter.PROGRESS)")
                results[name][run["name"]] = {"steps": list(steps), **noted}
        except Exception as error:
            if NO_RAY in str(error):
                raise  # all others would fail of it, too
            traceback.print_exc()
            results[name]["error"] = f"{type(error).__name__}: {error}"
        Path(spec["result"]).write_text(json.dumps(results))


def _make(recray: Any, run: Mapping[str, Any], checkout: str) -> dict[str, Any]:
    """All stages of a run; what training told after each epoch, where that is in this process, and seconds by stage."""
    seconds: dict[str, float] = {}
    epochs: list[dict[str, Any]] = []

    def timed(name: str, function: Any, *arguments: Any, **options: Any) -> None:
        started = time.perf_counter()
        function(*arguments, **options)
        seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - started, 2)

    config = _config(recray, run["table"])
    timed("prepare", recray.prepare, config)
    _check_workers(checkout)
    for until in (run["until"], None) if run["until"] else (None,):
        timed("train", recray.train, config, until=until, on_epoch=lambda entry: epochs.append(dict(entry)))
    if run["retriever"]:
        timed("index", recray.index, config)
    for split in run["splits"]:
        timed("evaluate", recray.evaluate, config, split)
    if run["retriever"]:
        timed("recommend", recray.recommend, config, run["lists"])
    return {"epochs": epochs, "seconds": seconds}


def _listen(steps: list[dict[str, Any]]) -> None:
    """Have every step of training in this process noted in `steps`."""
    for module, name in PROGRESS:
        if _there(module) and hasattr(importlib.import_module(module), name):
            shown = getattr(importlib.import_module(module), name)
            if hasattr(shown, "step"):
                break
    else:
        known = ", ".join(f"{module}.{name}" for module, name in PROGRESS)
        raise RuntimeError(f"none of {known} has a method `step`: name the class that has it in adapter.PROGRESS")
    step = shown.step

    @wraps(step)
    def noted(self: Any, *arguments: Any, **options: Any) -> Any:
        loss = arguments[0] if arguments else options["loss"]
        events = arguments[1] if len(arguments) > 1 else options.get("events")
        steps.append({"loss": float(loss).hex(), "events": None if events is None else float(events)})
        return step(self, *arguments, **options)

    shown.step = noted


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it
        return False


def _config(recray: Any, table: Mapping[str, Any]) -> Any:
    """The configuration of a table, with the keys and values that this checkout knows."""
    values = dict(_flat(table))
    model = {"model.name": values["model.name"]}

    def knows(key: str, value: Any) -> bool:
        try:
            _load(recray, model | {key: value})
        except recray.RecrayError:
            return False
        return True

    for key, names in VALUES.items():
        if key in values and not knows(key, values[key]):
            values[key] = [names.get(one, one) for one in values[key]]
    for key, later in KEYS.items():
        if key in values and not knows(key, values[key]) and knows(later, values[key]):
            values[later] = values.pop(key)
    return _load(recray, values)


def _load(recray: Any, values: Mapping[str, Any]) -> Any:
    # Texts, numbers, booleans and lists of them are the same in JSON and TOML.
    return recray.load_config(None, [f"{key}={json.dumps(value)}" for key, value in values.items()])


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_checkout(file: str | None, checkout: str) -> None:
    if file is None or not Path(file).resolve().is_relative_to(Path(checkout).resolve() / "recray"):
        raise RuntimeError(f"recray was imported from {file}, not from {checkout}")


def _check_workers(checkout: str) -> None:
    """Ray's processes must run the same code."""
    import ray

    _check_checkout(ray.get(ray.remote(num_cpus=0)(_file).remote()), checkout)


def _file() -> str | None:
    import recray

    file: str | None = recray.__file__
    return file


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
