"""A sweep's progress: a log line per trial, or a live table when a terminal shows the log; and its summary."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable

from rich.live import Live
from rich.table import Table

from recray import log, progress, storage
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
        shown = logging.getLogger("recray.tune").isEnabledFor(logging.INFO)
        console = progress.terminal() if shown else None
        # The table is drawn again and again: its time moves, also between two reports.
        self._live = (
            Live(console=console, refresh_per_second=2, transient=True, get_renderable=self._table) if console else None
        )
        self._task = progress.Task("tune", f"{title}: trials", total, len(past))

    def __enter__(self) -> Board:
        if self._live is not None:
            self._live.start()
        else:
            self._task.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._task.stop()
        if self._live is not None:
            self._live.stop()
            self._live.console.print(self._table())

    def running(self, trial: Trial) -> None:
        """A trial has started, or has reported an epoch."""
        self._running[trial.number] = trial
        epochs = sum(one.epochs for one in self._running.values())
        self._task.update(0, note=f"{len(self._running)} running, {epochs} epochs done in these")

    def stopped(self, trial: Trial) -> None:
        self._running.pop(trial.number, None)
        self._stopped[trial.number, trial.seed] = trial
        self._task.update()
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

    def _table(self) -> Table:
        total = f" of {self._total}" if self._total else ""
        table = Table(
            title=f"{self._title}: {len(self._stopped)}{total} trials ({count_statuses(list(self._stopped.values()))}), "
            f"{len(self._running)} running, {time.perf_counter() - self._started:.0f} s",
            title_justify="left",
        )
        for name in ("trial", "status", "epoch", self._objective.metric, "values"):
            table.add_column(name, justify="left" if name == "values" else "right")
        for _, trial in sorted(list(self._running.items())):  # another thread draws the table
            last = plain(trial.curve[-1].value) if trial.curve else ""
            table.add_row(str(trial.number), "running", str(trial.epochs), last, show(trial.values))
        table.add_section()
        for trial in self._objective.ranked(list(self._stopped.values()))[:_SHOWN]:
            table.add_row(str(trial.number), trial.status, str(trial.epochs), plain(trial.best), show(trial.values))
        return table


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
