"""Tracking: parameters, metrics by step and reports of a training, sent to TensorBoard, MLflow or a tracker of your own.

    [tracking]
    trackers = ["tensorboard", "mlflow"]

A training is one run of a tracker, whose key is the identity of its checkpoint: a resumed training and the evaluation of the
checkpoint continue it. Only worker 0 tracks. Trackers work in a thread of their own, and one that fails is left out with a
warning: nothing here changes what is trained, or ends it. The protocol and how to write one: README.md.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from recray import log, registry
from recray.artifacts import flatten
from recray.config import Config
from recray.errors import Interrupted
from recray.records import DatasetRecord, InputFile

Status = Literal["finished", "failed", "stopped"]
_WAITING = 10_000  # messages to slow trackers that are kept; later ones are dropped
_CLOSE_SECONDS = 60.0  # that the end of a training waits for them


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a training."""

    name: str  # <run.name>-<identity>
    identity: str  # of the checkpoint artefact: the same when it is resumed or evaluated
    folder: str  # of the checkpoint artefact
    run_uri: str  # <output>/<name>
    output: str
    parameters: dict[str, str]  # dotted key -> value, of the whole configuration
    tags: dict[str, str]  # lineage: recray.dataset, recray.inputs, recray.commit, ...
    inputs: Sequence[InputFile]  # the raw files


class Tracker(Protocol):
    """What `build(options, run)` of a plug-in returns. It may raise: recray then goes on without it."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Values after `step` optimizer steps; names such as train/loss, validation/ndcg@10, test/index/recall@20."""

    def files(self, uris: Sequence[str]) -> None:
        """Files to keep with the run: report.html, report.json."""

    def close(self, status: Status) -> None:
        """The training or the evaluation has ended. Called once, last."""


class _Session:
    """The trackers of one training or evaluation, in a thread of their own."""

    def __init__(self, config: Config, run: TrackedRun) -> None:
        self._config, self._run = config, run
        self._queue: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue(_WAITING)
        self._dropped = 0
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def send(self, method: str, *arguments: Any) -> None:
        try:
            self._queue.put_nowait((method, arguments))
        except queue.Full:
            self._dropped += 1

    def close(self, status: Status) -> None:
        # Not dropped where the queue is full: the thread ends by it, and trackers write what they hold.
        with contextlib.suppress(queue.Full):
            self._queue.put(("close", (status,)), timeout=_CLOSE_SECONDS)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive() or self._dropped:
            log.warning(
                "tracking", f"trackers are too slow: what they had not written after {_CLOSE_SECONDS:.0f} s is lost"
            )

    def _work(self) -> None:
        trackers: dict[str, Tracker] = {}
        for name in self._config.tracking.trackers:
            with self._surviving(name):
                trackers[name] = build(self._config, name, self._run)
        method = ""
        while method != "close":
            method, arguments = self._queue.get()
            for name, tracker in list(trackers.items()):
                with self._surviving(name) as ok:
                    getattr(tracker, method)(*arguments)
                    ok.append(True)
                if not ok:
                    del trackers[name]

    @contextlib.contextmanager
    def _surviving(self, name: str) -> Iterator[list[bool]]:
        """Says what a tracker raises, whatever it is, and goes on."""
        try:
            yield []
        except Exception as error:
            text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            log.warning("tracking", f"{name} failed and is left out: {text}", values={"tracker": name})


def build(config: Config, name: str, run: TrackedRun) -> Tracker:
    """The tracker `name` with its options of [tracking.options.<name>]."""
    folder = config.run.plugins
    options = config.tracking.options.get(name) or registry.options("tracker", name, folder)()
    tracker: Tracker = registry.load("tracker", name, folder).build(options, run)
    return tracker


_active: _Session | None = None  # of the training in this process


def metrics(values: Mapping[str, float], step: int) -> None:
    """Send values to the trackers of the training that runs in this process, if it has any."""
    if _active is not None:
        _active.send("metrics", dict(values), step)


@contextlib.contextmanager
def training(config: Config, dataset: DatasetRecord, dataset_uri: str, folder: str, rank: int) -> Iterator[None]:
    """Within this block, `metrics` reaches the configured trackers; on worker 0 only."""
    global _active
    if rank or not config.tracking.trackers:
        yield
        return
    _active = _Session(config, tracked_run(config, dataset, dataset_uri, folder))
    status: Status = "failed"
    try:
        yield
        status = "finished"
    except Interrupted:
        status = "stopped"
        raise
    finally:
        _active.close(status)
        _active = None


def report(
    config: Config,
    dataset: DatasetRecord,
    dataset_uri: str,
    folder: str,
    values: Mapping[str, float],
    step: int,
    files: Sequence[str],
) -> None:
    """Add an evaluation to the run of its training: metrics and files."""
    if not config.tracking.trackers:
        return
    session = _Session(config, tracked_run(config, dataset, dataset_uri, folder))
    session.send("metrics", dict(values), step)
    session.send("files", list(files))
    session.close("finished")


def tracked_run(config: Config, dataset: DatasetRecord, dataset_uri: str, folder: str) -> TrackedRun:
    identity = folder.rstrip("/").rpartition("/")[2]
    made = dataset.made_by.project or dataset.made_by.package
    inputs = [f"{one.uri} ({one.known_by} {one.state[:16]})" for one in dataset.inputs]
    tags = {
        "recray.run": config.run.name,
        "recray.checkpoint": identity,
        "recray.checkpoint_uri": folder,
        "recray.dataset": dataset.id,
        "recray.dataset_uri": dataset_uri,
        "recray.fingerprint": dataset.fingerprint,
        "recray.inputs": "\n".join(inputs),
        "recray.version": dataset.recray_version,
        "recray.commit": made.commit if made is not None else "",
    }
    return TrackedRun(
        f"{config.run.name}-{identity}",
        identity,
        folder,
        config.run_uri,
        config.run.output.rstrip("/"),
        {key: str(value) for key, value in flatten(config.model_dump(mode="json")).items()},
        {key: value for key, value in tags.items() if value},
        dataset.inputs,
    )
