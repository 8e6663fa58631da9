"""Progress of long work: bars with rate and time left on a terminal, elsewhere one line every 30 s.

    with progress.task("index", "measure settings", total=12) as task:
        ...
        task.update()

    for shard in progress.track(shards, "evaluate", "shards"): ...

Bars appear where `recray.log` writes to a terminal. Anywhere else the innermost task says where it is at most every
_LINE_SECONDS, over all tasks of the process, also while it makes no step; with `--json` as events `progress`. Where messages are
not shown (a library whose log is not configured, --quiet), nothing is.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from recray import log

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

T = TypeVar("T")
_LINE_SECONDS = 30.0
_REFRESH = 0.1  # seconds between updates of a bar: steps may take microseconds
_clock = time.monotonic

_lock = threading.RLock()
_tasks: list[Task] = []  # that run, the innermost last
_bars: Progress | None = None
_ticker: threading.Event | None = None  # set to end the thread that writes lines
_quiet_until = 0.0  # no line before


class Task:
    """Work in steps. Made by `task`, or started and stopped by itself where it is no block."""

    def __init__(self, stage: str, title: str, total: int | None = None, done: int = 0, lines: bool = True) -> None:
        """total: steps, if known; done: those of an earlier start; lines: False where other processes log its progress."""
        self.stage, self.title, self.total, self.lines = stage, title, total, lines
        self.done = self._first = done
        self.note = ""
        self._bar: Any = None  # its row in _bars
        self._next = 0.0
        self.started = 0.0

    def start(self) -> Task:
        self.started = _clock()
        if logging.getLogger(f"recray.{self.stage}").isEnabledFor(logging.INFO):
            _begin(self)
        return self

    def update(self, steps: int = 1, note: str = "") -> None:
        """`steps` more are done. note: figures to show next to them."""
        self.done += steps
        self.note = note or self.note
        now = _clock()
        if now >= self._next and self in _tasks:
            self._next = now + _REFRESH
            self._show(now)

    def stop(self) -> None:
        _end(self)

    @property
    def rate(self) -> float:
        """Steps per second since its start."""
        return (self.done - self._first) / max(_clock() - self.started, 1e-9)

    @property
    def left(self) -> float | None:
        """Seconds, at the rate so far."""
        if self.total is None or self.done == self._first:
            return None
        return (self.total - self.done) / self.rate

    def _show(self, now: float) -> None:
        if _bars is not None and self._bar is not None:
            _bars.update(self._bar, completed=self.done, **self._fields())
        else:
            _line(now)

    def _fields(self) -> dict[str, Any]:
        """Texts of its bar."""
        count = f"{self.done:,}/{self.total:,}" if self.total is not None else ""
        left = f"{timedelta(seconds=round(self.left))} left" if self.left is not None else ""
        return {"count": count, "left": left, "note": self._text()}

    def _text(self) -> str:
        return "  ".join(one for one in (f"{self.rate:,.4g}/s" if self.done > self._first else "", self.note) if one)

    def line(self) -> str:
        """'write shards 12/40  1.3/s  22 s left'."""
        done = f"{self.done:,}/{self.total:,}" if self.total is not None else f"{_clock() - self.started:,.0f} s"
        left = f"{self.left:,.0f} s left" if self.left is not None else ""
        return "  ".join(one for one in (f"{self.title} {done}", self._text(), left) if one)


@contextlib.contextmanager
def task(stage: str, title: str, total: int | None = None, lines: bool = True) -> Iterator[Task]:
    """Show a task while the block runs. stage: who speaks, as in `recray.log`."""
    one = Task(stage, title, total, lines=lines).start()
    try:
        yield one
    finally:
        one.stop()


def track(entries: Iterable[T], stage: str, title: str, total: int | None = None, enabled: bool = True) -> Iterator[T]:
    """The entries; each is a step, which is done when the next one is asked for."""
    if not enabled:
        yield from entries
        return
    with task(stage, title, len(entries) if total is None and isinstance(entries, Sized) else total) as one:
        for entry in entries:
            yield entry
            one.update()


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Ends the tasks that are started and, for an error, not stopped inside of the block."""
    before = list(_tasks)
    try:
        yield
    finally:
        for one in [one for one in _tasks if one not in before]:
            one.stop()


def terminal() -> Console | None:
    """The terminal that the log is written to, if it is one."""
    for handler in logging.getLogger("recray").handlers:
        console = getattr(handler, "console", None)  # of rich's handler, which need not be loaded for this
        if console is not None and console.is_terminal:
            found: Console = console
            return found
    return None


def _begin(one: Task) -> None:
    global _bars, _ticker, _quiet_until
    with _lock:
        console = terminal()
        if not _tasks:
            _quiet_until = max(_quiet_until, one.started + _LINE_SECONDS)
            if console is not None:
                _bars = _make_bars(console)
                _bars.start()
            else:
                _ticker = threading.Event()
                threading.Thread(target=_tick, args=(_ticker,), name="progress", daemon=True).start()
        _tasks.append(one)
        if _bars is not None:
            one._bar = _bars.add_task(f"{one.stage}: {one.title}", total=one.total, completed=one.done, **one._fields())


def _end(one: Task) -> None:
    global _bars, _ticker
    with _lock:
        if one not in _tasks:
            return
        _tasks.remove(one)
        if _bars is not None and one._bar is not None:
            _bars.remove_task(one._bar)
        if not _tasks:
            if _bars is not None:
                _bars.stop()
            if _ticker is not None:
                _ticker.set()
            _bars = _ticker = None


def _make_bars(console: Console) -> Progress:
    from rich import progress

    texts = [progress.TextColumn(f"{{task.fields[{name}]}}") for name in ("count", "left", "note")]
    bar = (progress.SpinnerColumn(), progress.TextColumn("{task.description}"), progress.BarColumn(20))
    return progress.Progress(*bar, texts[0], progress.TimeElapsedColumn(), *texts[1:], console=console, transient=True)


def _tick(ended: threading.Event) -> None:
    """Work that makes no step for long says that it is still going on."""
    while not ended.wait(min(_LINE_SECONDS, 1.0)):
        _line(_clock())


def _line(now: float) -> None:
    """Log where the innermost task is, unless a line was written in the last _LINE_SECONDS."""
    global _quiet_until
    with _lock:
        told = [one for one in _tasks if one.lines]
        if now < _quiet_until or not told or _bars is not None:
            return
        _quiet_until = now + _LINE_SECONDS
        one = told[-1]
    values = {"title": one.title, "done": one.done, "total": one.total, "seconds": now - one.started, "left": one.left}
    log.info(one.stage, one.line(), event="progress", values=values)
