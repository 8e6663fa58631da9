"""What training reports: progress while an epoch runs, an event when it ends, and advice where loading is slow."""

from __future__ import annotations

import time

from recray import log, progress, tracking

# Of an entry, what the text of an epoch does not repeat; the event has all numbers.
_TIMES = (
    *("epoch", "loss", "seconds", "events_per_second", "waiting_share", "first_batch_seconds", "first_step_at"),
    *("read_seconds", "cut_seconds", "copy_seconds", "validation_seconds", "saving_seconds"),
)
_TRACKED = 20  # losses of single steps that are sent to trackers, per epoch
_SLOW = 0.1  # share of an epoch spent waiting for batches that is worth advice
ADVICE = {
    "read": "set scaling.reader = 'ray_data' to read on other cores and nodes, or move the dataset closer",
    "cut": "raise scaling.num_workers (each worker cuts its own rows), or lower model.history_length",
    "copy": "remove features that do not help: every batch carries all of them to the device",
}


class Progress:
    """Measures and reports the epochs of one phase. Only worker 0 reports (`enabled`); all measure."""

    def __init__(self, name: str, epochs: int, steps: int, enabled: bool) -> None:
        self._name, self._epochs, self._steps, self._enabled = name, epochs, steps, enabled
        self._task: progress.Task | None = None
        self._stages: dict[str, float] = {}
        self._advised = False
        self._reset()

    def _reset(self) -> None:
        self._started = time.perf_counter()
        self._events = self._waited = self._first_wait = self._first_step_at = 0.0
        self._count = 0

    @property
    def seconds(self) -> float:
        """Since the epoch was started or resumed."""
        return time.perf_counter() - self._started

    def start_epoch(self, epoch: int, done: int = 0) -> None:
        """done: steps of the epoch that were taken before training was resumed."""
        self._reset()
        self._epoch, self._done = epoch, done
        if self._enabled:
            title = f"epoch {epoch + 1}/{self._epochs}"
            self._task = progress.Task(self._name, title, self._steps, done).start()

    def step(self, loss: float, events: float, waited: float) -> None:
        """After every optimizer step: the global mean loss, the global number of queries, and the seconds this worker
        waited for its batches."""
        self._events += events
        self._waited += waited
        if not self._count:
            self._first_wait, self._first_step_at = waited, time.time()
        self._count += 1
        at = self._done + self._count
        if self._enabled and at % max(1, self._steps // _TRACKED) == 0:
            tracking.metrics({f"{self._name}/loss": loss}, self._epoch * self._steps + at)
        if self._task is not None:
            seconds = self.seconds
            rate = f"{self._events / seconds:,.0f} events/s"
            self._task.update(note=f"loss {loss:.4f}  {rate}  waiting {self._waited / seconds:.0%}")

    def end_epoch(self, stages: dict[str, float]) -> dict[str, float]:
        """Return the epoch's measurements.

        stages: seconds of the loader's stages read, cut and copy, since training began.

        Returns <stage>_seconds of this epoch, seconds, events_per_second, waiting_share (of the time, spent waiting for
        batches), first_batch_seconds, and first_step_at (when the first step was done, seconds since 1970).
        """
        if self._task is not None:
            self._task.stop()
            self._task = None
        seconds = self.seconds
        took = {name: value - self._stages.get(name, 0.0) for name, value in stages.items()}
        self._stages = stages
        self._advise((self._waited - self._first_wait) / seconds, took)
        return {
            **{f"{name}_seconds": value for name, value in took.items()},
            "seconds": seconds,
            "events_per_second": self._events / seconds,
            "waiting_share": self._waited / seconds,
            "first_batch_seconds": self._first_wait,
            "first_step_at": self._first_step_at,
        }

    def report(self, entry: dict[str, float]) -> None:
        """Log an epoch's entry of the history."""
        if not self._enabled:
            return
        tracking.metrics(self._tracked(entry), int(entry["epoch"]) * self._steps)
        metrics = "".join(f"  {name} {value:.4f}" for name, value in entry.items() if name not in _TIMES)
        log.info(
            self._name,
            f"epoch {int(entry['epoch'])}/{self._epochs}  loss {entry['loss']:.4f}{metrics}  "
            f"{entry['events_per_second']:,.0f} events/s  {entry['seconds']:.1f} s  waiting {entry['waiting_share']:.0%}",
            event="epoch",
            values=entry,
        )

    def _tracked(self, entry: dict[str, float]) -> dict[str, float]:
        """An epoch's entry by the names that trackers show."""
        own = ("events_per_second", "waiting_share", "seconds", "validation_seconds", "saving_seconds")
        values = {f"{self._name}/epoch_loss": entry["loss"], "epoch": entry["epoch"]}
        values |= {f"{self._name}/{name}": entry[name] for name in own if name in entry}
        return values | {f"validation/{name}": value for name, value in entry.items() if name not in _TIMES}

    def _advise(self, waiting: float, took: dict[str, float]) -> None:
        """Once: why the model waits, and what to set. `waiting` excludes the first batch, which waits for the start-up."""
        if waiting < _SLOW or self._advised or not self._enabled:
            return
        self._advised = True
        slowest = max(took, key=lambda name: took[name])
        times = ", ".join(f"{name} {value:.1f} s" for name, value in took.items())
        log.warning(
            self._name,
            f"the model waited for batches {waiting:.0%} of the epoch; the slowest stage is {slowest} ({times}): "
            f"{ADVICE[slowest]}",
            event="slow_loader",
            values={"waiting_share": waiting, "slowest": slowest, **{f"{name}_seconds": took[name] for name in took}},
        )
