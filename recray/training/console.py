"""What the terminal shows of training: a bar where there is a terminal, a line an epoch everywhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_TIMES = (
    *("epoch", "loss", "seconds", "events_per_second", "waiting_share", "first_batch_seconds", "first_step_at"),
    *("read_seconds", "cut_seconds", "copy_seconds", "validation_seconds"),
)
_SLOW = 0.1  # share of an epoch spent waiting for batches that is worth a line
_ADVICE = {
    "read": "set scaling.reader = 'ray_data', so that other cores and nodes read, or put the dataset nearer",
    "cut": "raise scaling.num_workers (each worker cuts its own share), or lower model.history_length",
    "copy": "leave out features that do not help: every batch carries all of them to the device",
}


class Progress:
    def __init__(self, name: str, epochs: int, steps: int, enabled: bool) -> None:
        self._name, self._epochs, self._steps, self._enabled = name, epochs, steps, enabled
        self._bar: Bar | None = None
        self._stages: dict[str, float] = {}
        self._explained = False
        self._reset()

    def _reset(self) -> None:
        self._started = time.perf_counter()
        self._events = self._waited = self._first_wait = self._first_step_at = 0.0
        self._count = 0

    def start_epoch(self, epoch: int) -> None:
        self._reset()
        if self._enabled and sys.stderr.isatty():
            text = TextColumn(
                "{task.description}  loss {task.fields[loss]:.4f}  {task.fields[rate]:,.0f} events/s  waiting {task.fields[wait]:.0%}"
            )
            self._bar = Bar(
                TextColumn(self._name),
                BarColumn(),
                text,
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._id = self._bar.add_task(
                f"epoch {epoch + 1}/{self._epochs}", total=self._steps, loss=0.0, rate=0.0, wait=0.0
            )

    def step(self, loss: float, events: float, waited: float) -> None:
        self._events += events
        self._waited += waited
        if not self._count:
            self._first_wait, self._first_step_at = waited, time.time()
        self._count += 1
        if self._bar is not None:
            seconds = time.perf_counter() - self._started
            self._bar.update(self._id, advance=1, loss=loss, rate=self._events / seconds, wait=self._waited / seconds)

    def end_epoch(self, stages: dict[str, float]) -> dict[str, float]:
        """Of the epoch's training part: seconds, events_per_second, share of time spent waiting for data, the wait for
        the first batch, when its step was done (seconds since 1970), and the seconds of each loader stage.

        `stages`: seconds of read, cut and copy since training began.
        """
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        seconds = time.perf_counter() - self._started
        took = {name: value - self._stages.get(name, 0.0) for name, value in stages.items()}
        self._stages = stages
        self._explain((self._waited - self._first_wait) / seconds, took)
        return {
            **{f"{name}_seconds": value for name, value in took.items()},
            "seconds": seconds,
            "events_per_second": self._events / seconds,
            "waiting_share": self._waited / seconds,
            "first_batch_seconds": self._first_wait,
            "first_step_at": self._first_step_at,
        }

    def _explain(self, waiting: float, took: dict[str, float]) -> None:
        """Once: why the model waits, and what to set. Starting, the first batch's wait, is no reason."""
        if waiting < _SLOW or self._explained or not self._enabled:
            return
        self._explained = True
        slowest = max(took, key=lambda name: took[name])
        times = ", ".join(f"{name} {value:.1f} s" for name, value in took.items())
        print(
            f"{self._name}: the model waited for batches {waiting:.0%} of the epoch; the slowest stage is {slowest} ({times}): "
            f"{_ADVICE[slowest]}",
            flush=True,
        )

    def report(self, entry: dict[str, float]) -> None:
        if not self._enabled:
            return
        extra = "".join(f"  {name} {value:.4f}" for name, value in entry.items() if name not in _TIMES)
        print(
            f"{self._name}: epoch {int(entry['epoch'])}/{self._epochs}  loss {entry['loss']:.4f}{extra}  {entry['events_per_second']:,.0f} events/s  "
            f"{entry['seconds']:.1f} s  waiting {entry['waiting_share']:.0%}",
            flush=True,
        )
