"""What a sweep optimizes: one validation metric and its direction."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from recray.config import Config
from recray.metrics import higher_is_better
from recray.records import Trial


class Objective(NamedTuple):
    metric: str
    mode: Literal["max", "min"]

    @classmethod
    def of(cls, config: Config) -> Objective:
        metric = config.tune.metric or config.training.metric
        higher = metric != "loss" and higher_is_better(metric, config.run.plugins)
        return cls(metric, config.tune.mode or ("max" if higher else "min"))

    def best(self, values: Iterable[float]) -> float | None:
        """The best of some values; None when there are none."""
        return (max if self.mode == "max" else min)(values, default=None)

    def ranked(self, trials: Iterable[Trial]) -> list[Trial]:
        """Trials that have a value, best first; the order of equal ones stays."""
        return sorted((t for t in trials if t.best is not None), key=self._best_of, reverse=self.mode == "max")

    @staticmethod
    def _best_of(trial: Trial) -> float:
        assert trial.best is not None
        return trial.best
