"""A sweep's progress: a log line per trial, or a live table when a terminal shows the log; and its summary."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable

from rich.console import Console
from rich.live import Live
from rich.logging import RichHandler
from rich.table import Table

from recray import log, storage
from recray.records import Trial, TuneRecord
from recray.tuning.importance import unmeasured
from recray.tuning.objective import Objective
from recray.tuning.space import plain, show

_SHOWN = 5  # best trials in the table


class Board:
    """Shows trials while they run. total: how many there will be, if known; past: those of earlier starts."""

    def __init__(self, title: str, objective: Objective, total: int | None, past: list[Trial]) -> None:
        self._title, self._objective, self._total = title, objective, total
        self._stopped = {(trial.number, trial.seed): trial for trial in past}
        self._running: dict[int, Trial] = {}
        self._started = time.perf_counter()
        console = _terminal()
        self._live = Live(console=console, refresh_per_second=4) if console else None

    def __enter__(self) -> Board:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.update(self._table())
            self._live.stop()

    def running(self, trial: Trial) -> None:
        """A trial has started, or has reported an epoch."""
        self._running[trial.number] = trial
        if self._live is not None:
            self._live.update(self._table())

    def stopped(self, trial: Trial) -> None:
        self._running.pop(trial.number, None)
        self._stopped[trial.number, trial.seed] = trial
        best = self._objective.ranked(self._stopped.values())[:1]
        result = f"{self._objective.metric} {trial.best:.4f}" if trial.best is not None else trial.reason
        so_far = f"  best {best[0].best:.4f} of trial {best[0].number}" if best else ""
        total = f"/{self._total}" if self._total else ""
        (log.debug if self._live is not None else log.info)(
            "tune",
            f"{self._title} {len(self._stopped)}{total}: trial {trial.number} {trial.status}, {trial.epochs} epochs in "
            f"{trial.seconds:.1f} s  {result}{so_far}  {show(trial.values)}",
            event="trial",
            values=trial.model_dump(mode="json", exclude={"curve", "switches"}),
        )
        if self._live is not None:
            self._live.update(self._table())

    def _table(self) -> Table:
        total = f" of {self._total}" if self._total else ""
        table = Table(
            title=f"{self._title}: {len(self._stopped)}{total} trials ({count_statuses(self._stopped.values())}), "
            f"{len(self._running)} running, {time.perf_counter() - self._started:.0f} s",
            title_justify="left",
        )
        for name in ("trial", "status", "epoch", self._objective.metric, "values"):
            table.add_column(name, justify="left" if name == "values" else "right")
        for _, trial in sorted(self._running.items()):
            last = plain(trial.curve[-1].value) if trial.curve else ""
            table.add_row(str(trial.number), "running", str(trial.epochs), last, show(trial.values))
        table.add_section()
        for trial in self._objective.ranked(self._stopped.values())[:_SHOWN]:
            table.add_row(str(trial.number), trial.status, str(trial.epochs), plain(trial.best), show(trial.values))
        return table


def _terminal() -> Console | None:
    """The terminal to which recray's log is written at its normal level, if any."""
    logger = logging.getLogger("recray")
    consoles = [handler.console for handler in logger.handlers if isinstance(handler, RichHandler)]
    return consoles[0] if consoles and consoles[0].is_terminal and logger.isEnabledFor(logging.INFO) else None


def count_statuses(trials: Iterable[Trial]) -> str:
    """ "3 done, 1 failed" """
    counts = Counter(trial.status for trial in trials)
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items())) or "none"


def summary(record: TuneRecord, sweep_uri: str) -> str:
    """The finalists, the importance of the keys, and the next command."""
    lines = [f"{len(record.trials)} trials ({count_statuses(record.trials)}), {record.cpu_hours:.3f} CPU hours", ""]
    trials = {trial.number: trial for trial in record.trials}
    if record.finalists:
        lines.append(f"{'trial':>6}{'search':>10}{'other seeds':>20}  values       (validation {record.metric})")
    for one in record.finalists:
        retrained = f"{one.mean:.4f} +- {one.std:.4f}"
        lines.append(f"{one.number:6}{trials[one.number].best or 0.0:10.4f}{retrained:>20}  {show(one.values)}")
    if not record.finalists and record.winner is not None:
        best = trials[record.winner]
        lines.append(f"best: trial {best.number}, {record.metric} {best.best:.4f} on one seed  {show(best.values)}")
    if record.importance:
        shares = ", ".join(f"{key} {share:.0%}" for key, share in record.importance.items())
        lines += ["", f"importance (variance explained by a key alone): {shares}"]
    if unknown := ", ".join(f"{key} ({why})" for key, why in unmeasured(record.trials).items()):
        lines += ["", f"importance unknown: {unknown}"]
    page = storage.join(sweep_uri, "tune.html")
    return "\n".join([*lines, "", *([page] if storage.exists(page) else []), f"next: recray run {sweep_uri}/best.toml"])
