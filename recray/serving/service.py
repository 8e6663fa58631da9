"""The model that is served: requests in batches, admission, and a swap without a dropped request.

One thread asks the model. While it works, requests queue up; it then takes what has come, up to a batch, so that a request
waits for at most the batch before its own, and an idle server does not wait at all. A request that would wait too long is
refused before its body is read: a queue that grows makes every answer late.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

import recray.inference
from recray import log, storage
from recray.errors import DataError, RecrayError
from recray.inference import LoadedRanker, LoadedRetriever, bundle
from recray.served import served_of

Model = LoadedRetriever | LoadedRanker
Group = tuple[Any, ...]


BUSY = "too many requests are waiting: try again in a second"


class Overloaded(Exception):
    """The request waited too long."""


@dataclass(frozen=True)
class Loaded:
    """A model and the state of its source when it was loaded."""

    model: Model
    version: str


@dataclass
class Work:
    """A request. Those with the same `group` are answered by one call of `answer(model, requests)`."""

    group: Group
    request: Any
    answer: Callable[[Model, Sequence[Any]], list[Any]]
    deadline: float
    future: Future[tuple[str, Any]] = field(default_factory=Future)  # (identity of the model, answer)


def version_of(uri: str) -> str:
    """Changes when another bundle lies at `uri`, or when a run serves another promotion."""
    if bundle.is_bundle(uri):
        return hashlib.sha256(storage.read_bytes(storage.join(uri, bundle.MANIFEST))).hexdigest()
    served = served_of(uri)
    return served.model_dump_json() if served is not None else "nothing was promoted"


class Service:
    """Answers requests with the model at `uri`, and follows it when another one is promoted.

    wait: seconds; a request that would wait longer is not admitted. timeout: one that waited longer all the same is refused
    when its turn comes. batch: the most that are answered together.
    """

    def __init__(self, uri: str, wait: float = 0.05, timeout: float = 1.0, batch: int = 16) -> None:
        self.uri, self.wait, self.timeout, self._most = uri.rstrip("/"), wait, timeout, batch
        self.admitted = 0  # requests that are not answered yet; the event loop alone changes it
        self.running = 0  # requests of the batch that is being answered
        self.fixed, self.each = 0.002, 0.001  # seconds of a batch, and of each of its requests; learned from batches
        self.loaded = self._load()
        self.swaps = self.failures = 0
        self.observe_batch: Callable[[int], None] = lambda size: None
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, daemon=True, name="recray-serve")]

    def start(self, poll: float = 5.0) -> None:
        """poll: seconds between two looks at what is served."""
        if poll:
            self._threads.append(threading.Thread(target=self._follow, args=(poll,), daemon=True, name="recray-swap"))
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Answer what is waiting, and end."""
        self._stop.set()
        self._queue.put(None)
        for thread in self._threads:
            thread.join()

    @property
    def alive(self) -> bool:
        return self._threads[0].is_alive()

    def admits(self) -> bool:
        """Whether one more request would be answered soon enough; always, if none is waiting for the next batch."""
        waiting = self.admitted - self.running
        return waiting <= 0 or self._seconds(self.running) + self._seconds(waiting + 1) <= self.wait

    def _seconds(self, requests: int) -> float:
        return -(-requests // self._most) * self.fixed + requests * self.each

    def submit(
        self, group: Group, request: Any, answer: Callable[[Model, Sequence[Any]], list[Any]]
    ) -> Future[tuple[str, Any]]:
        """The future raises Overloaded if the request waits longer than the time-out."""
        work = Work(group, request, answer, time.monotonic() + self.timeout)
        self._queue.put(work)
        return work.future

    def swap(self) -> bool:
        """Load and serve what the source holds now, if it changed. Raises RecrayError if it cannot be loaded."""
        if version_of(self.uri) == self.loaded.version:
            return False
        self.loaded = self._load()
        self.swaps += 1
        log.info("serve", f"serving {self.loaded.model.identity}", event="swapped")
        return True

    def _load(self) -> Loaded:
        version = version_of(self.uri)
        model = recray.inference.load(self.uri, in_memory=True)
        _warm(model)
        return Loaded(model, version)

    def _follow(self, poll: float) -> None:
        while not self._stop.wait(poll):
            try:
                self.swap()
            except (RecrayError, OSError) as error:  # what is served stays; the next look may find it complete
                self.failures += 1
                log.warning("serve", f"still serving {self.loaded.model.identity}: {error}", event="swap_failed")

    def _work(self) -> None:
        torch.set_grad_enabled(False)  # of this thread
        while (first := self._queue.get()) is not None:
            groups: dict[Group, list[Work]] = {first.group: [first]}
            for _ in range(min(self._queue.qsize(), self._most - 1)):
                if (work := self._queue.get()) is None:
                    self._queue.put(None)
                    break
                groups.setdefault(work.group, []).append(work)
            loaded, started = self.loaded, time.monotonic()
            self.running = size = sum(map(len, groups.values()))
            for works in groups.values():
                self._answer(loaded.model, [one for one in works if not _expired(one, started)])
            self._learn(size, time.monotonic() - started)
            self.running = 0
            self.observe_batch(size)

    def _learn(self, size: int, seconds: float) -> None:
        """A step of normalised least mean squares. One slow batch, such as one during a swap, says little about the next."""
        expected = self.fixed + size * self.each
        step = 0.1 * (min(seconds, 4 * expected) - expected) / (1 + size * size)
        self.fixed, self.each = max(self.fixed + step, 1e-6), max(self.each + size * step, 1e-6)

    def _answer(self, model: Model, works: list[Work]) -> None:
        if not works:
            return
        try:
            found = works[0].answer(model, [one.request for one in works])
        except Exception as error:
            if len(works) == 1:
                works[0].future.set_exception(error)
                return
            for one in works:  # one of them is wrong
                self._answer(model, [one])
            return
        for one, answer in zip(works, found, strict=True):
            one.future.set_result((model.identity, answer))


def _warm(model: Model) -> None:
    """Ask once, so that no request waits for what is made at the first call."""
    item = model.inputs.items[-1].as_py()
    if isinstance(model, LoadedRetriever):
        model.recommend(history=[[item]], k=1)
        model.similar_items(item, 1)
        model.inputs.users.find(model.inputs.users.keys.slice(0, 1))
    ranker = model.ranker if isinstance(model, LoadedRetriever) else model
    if ranker is not None:
        ranker.score([{ranker.config.data.columns.item: item, "history": [item]}])


def _expired(work: Work, now: float) -> bool:
    """Whether a request waited too long, or is no longer awaited; it is marked."""
    if not work.future.set_running_or_notify_cancel():
        return True
    if now > work.deadline:
        work.future.set_exception(Overloaded(BUSY))
        return True
    return False


def retriever_of(model: Model) -> LoadedRetriever:
    """Raises DataError for a ranker that is served alone."""
    if isinstance(model, LoadedRetriever):
        return model
    raise DataError("this model ranks given items and finds none: POST /score")


def ranker_of(model: Model) -> LoadedRanker:
    """Raises DataError for a retriever that is served without one."""
    ranker = model.ranker if isinstance(model, LoadedRetriever) else model
    if ranker is None:
        raise DataError("no ranker is served: set retrieval.ranker, or serve the run of a ranker")
    return ranker
