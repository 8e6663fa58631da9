"""What the terminal shows of a sweep: a live table where there is a terminal, a line a trial everywhere else."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.live import Live
from rich.table import Table

from recray.records import Trial, TrialEpoch, TuneRecord
from recray.tuning.space import Point, plain, show

_BEST = 5  # trials that ended and stay in the table
_STATES = ("done", "paused", "pruned", "failed", "cut")


class Board:
    def __init__(self, title: str, metric: str, mode: str, total: int | None, past: list[Trial]) -> None:
        self._title, self._metric, self._mode, self._total = title, metric, mode, total
        self._ended = {(trial.number, trial.seed): trial for trial in past}  # a waiting one that goes on stays
        self._running: dict[int, tuple[Point, TrialEpoch | None]] = {}
        self._started = time.perf_counter()
        self._live = Live(console=Console(), refresh_per_second=4) if sys.stdout.isatty() else None

    def __enter__(self) -> Board:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.update(self._table())
            self._live.stop()

    def epoch(self, number: int, values: Point, epoch: TrialEpoch | None) -> None:
        self._running[number] = (values, epoch)
        if self._live is not None:
            self._live.update(self._table())

    def end(self, trial: Trial) -> None:
        self._running.pop(trial.number, None)
        self._ended[trial.number, trial.seed] = trial
        if self._live is not None:
            self._live.update(self._table())
            return
        value = f"{self._metric} {trial.best:.4f}" if trial.best is not None else trial.reason
        best = self._best()
        so_far = f"  best {best[0].best:.4f} of trial {best[0].number}" if best else ""
        total = f"/{self._total}" if self._total else ""
        print(
            f"{self._title}: {len(self._ended)}{total}  trial {trial.number} {trial.status}, {trial.epochs} epochs in "
            f"{trial.seconds:.1f} s  {value}{so_far}  {show(trial.values)}",
            flush=True,
        )

    def _best(self) -> list[Trial]:
        known = [trial for trial in self._ended.values() if trial.best is not None]
        return sorted(known, key=lambda trial: trial.best or 0.0, reverse=self._mode == "max")[:_BEST]

    def _table(self) -> Table:
        counts = {status: sum(t.status == status for t in self._ended.values()) for status in _STATES}
        shown = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        total = f" of {self._total}" if self._total else ""
        table = Table(
            title=f"{self._title}: {len(self._ended)}{total} tried ({shown or 'none'}), {len(self._running)} running, "
            f"{time.perf_counter() - self._started:.0f} s",
            title_justify="left",
        )
        for name in ("trial", "", "epoch", self._metric, "values"):
            table.add_column(name, justify="left" if name == "values" else "right")
        for number, (values, epoch) in sorted(self._running.items()):
            at = (str(epoch.epoch), plain(epoch.value)) if epoch else ("0", "")
            table.add_row(str(number), "running", *at, show(values))
        table.add_section()
        for trial in self._best():
            table.add_row(
                str(trial.number), trial.status, str(trial.epochs), plain(trial.best or 0.0), show(trial.values)
            )
        return table


def summary(record: TuneRecord, folder: str) -> str:
    """The finalists and where everything is, for the end of a sweep."""
    counts = {status: sum(t.status == status for t in record.trials) for status in _STATES}
    shown = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    lines = [f"{len(record.trials)} trials ({shown}), {record.cpu_hours:.3f} CPU hours", ""]
    own = {trial.number: trial for trial in record.trials}
    if record.finalists:
        lines.append(f"{'trial':>6}{'found at':>10}{'on other seeds':>20}  values       ({record.metric}, validation)")
    for one in record.finalists:
        again = f"{one.mean:.4f} +- {one.std:.4f}"
        lines.append(f"{one.number:6}{own[one.number].best or 0.0:10.4f}{again:>20}  {show(one.values)}")
    if not record.finalists and record.winner is not None:
        best = own[record.winner]
        lines.append(f"best: trial {best.number}, {record.metric} {best.best:.4f}, of one seed  {show(best.values)}")
    if record.importance:
        parts = ", ".join(f"{key} {share:.0%}" for key, share in record.importance.items())
        lines += ["", f"importance (variance explained alone): {parts}"]
    return "\n".join([*lines, "", f"{folder}/tune.html", f"recray run {folder}/best.toml"])
