"""Points of [tune.space]: a value for every key that counts. numpy only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from recray.config import Axis, Config, with_values
from recray.errors import ConfigError

Point = dict[str, Any]


@dataclass(frozen=True)
class Space:
    base: Config
    axes: dict[str, Axis]  # what a condition asks for comes before what has the condition
    whole: frozenset[str]  # keys whose values are whole numbers

    def counts(self, key: str, point: Point) -> bool:
        """Whether a key's conditions hold, given the keys before it."""
        for other, allowed in self.axes[key].when.items():
            value = point.get(other) if other in self.axes else value_of(self.base, other)
            if value not in allowed:
                return False
        return True

    def draw(self, rng: np.random.Generator) -> Point:
        point: Point = {}
        for key in self.axes:
            if self.counts(key, point):
                point[key] = self._one(key, rng)
        return point

    def _one(self, key: str, rng: np.random.Generator) -> Any:
        axis, values = self.axes[key], self.values(key)
        if values is not None and not axis.log:
            return values[int(rng.integers(len(values)))]
        assert axis.low is not None and axis.high is not None
        low, high = (math.log(axis.low), math.log(axis.high)) if axis.log else (axis.low, axis.high)
        drawn = float(rng.uniform(low, high))
        return self.clip(key, math.exp(drawn) if axis.log else drawn)

    def clip(self, key: str, value: Any) -> Any:
        """A number inside its range, whole where the key is."""
        axis = self.axes[key]
        if axis.low is None or axis.high is None:
            return value
        inside = min(max(value, axis.low), axis.high)
        return round(inside) if key in self.whole else float(inside)

    def values(self, key: str) -> list[Any] | None:
        """All values of a key, in order; None where there is no end of them."""
        axis = self.axes[key]
        if axis.choices is not None:
            return axis.choices
        assert axis.low is not None and axis.high is not None
        step = axis.step or (1.0 if key in self.whole else None)
        if step is None:
            return None
        count = math.floor((axis.high - axis.low) / step + 1e-9) + 1
        numbers = [axis.low + i * step for i in range(count)]
        return [round(n) for n in numbers] if key in self.whole else [float(f"{n:.12g}") for n in numbers]

    def grid(self) -> Iterator[Point]:
        """Every point once, the last key fastest. Every key has `values`."""
        seen: list[Point] = []
        conditional = any(axis.when for axis in self.axes.values())
        known = {key: self.values(key) or [] for key in self.axes}
        for combination in itertools.product(*known.values()):
            point: Point = {}
            for key, value in zip(known, combination, strict=True):
                if self.counts(key, point):
                    point[key] = value
            if conditional:
                if point in seen:
                    continue
                seen.append(point)
            yield point

    def config(self, point: Point) -> Config:
        """The configuration of a point. Raises ConfigError where its values do not go together."""
        return with_values(self.base, point, where=show(point))

    def valid(self, point: Point) -> bool:
        try:
            self.config(point)
        except ConfigError:
            return False
        return True


def value_of(config: Config, dotted: str) -> Any:
    """The value of a key. Raises AttributeError where there is none."""
    value: Any = config
    for name in dotted.split("."):
        value = getattr(value, name)
    return value


def show(point: Point) -> str:
    """'model.dim=64 optim.learning_rate=0.00123'"""
    return " ".join(f"{key}={plain(value)}" for key, value in point.items())


def plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
