"""What the terminal shows of training: a bar where there is a terminal, a line an epoch everywhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_TIMES = ("epoch", "loss", "seconds", "events_per_second", "waiting_share", "first_batch_seconds", "first_step_at")


class Progress:
    def __init__(self, name: str, epochs: int, steps: int, enabled: bool) -> None:
        self._name, self._epochs, self._steps, self._enabled = name, epochs, steps, enabled
        self._bar: Bar | None = None
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

    def end_epoch(self) -> dict[str, float]:
        """Of the epoch's training part: seconds, events_per_second, share of time spent waiting for data, the wait for
        the first batch, and when its step was done (seconds since 1970)."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        seconds = time.perf_counter() - self._started
        return {
            "seconds": seconds,
            "events_per_second": self._events / seconds,
            "waiting_share": self._waited / seconds,
            "first_batch_seconds": self._first_wait,
            "first_step_at": self._first_step_at,
        }

    def report(self, entry: dict[str, float]) -> None:
        if not self._enabled:
            return
        extra = "".join(f"  {name} {value:.4f}" for name, value in entry.items() if name not in _TIMES)
        print(
            f"{self._name}: epoch {int(entry['epoch'])}/{self._epochs}  loss {entry['loss']:.4f}{extra}  {entry['events_per_second']:,.0f} events/s  "
            f"{entry['seconds']:.1f} s  waiting {entry['waiting_share']:.0%}",
            flush=True,
        )
