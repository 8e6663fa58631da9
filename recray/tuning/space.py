"""The search space [tune.space] and its points.

A point has a value for every active key. With

    "loss.name" = { choices = ["gbce", "bpr"] }
    "loss.calibration" = { low = 0.5, high = 1.0, when = { "loss.name" = "gbce" } }

{"loss.name": "gbce", "loss.calibration": 0.7} and {"loss.name": "bpr"} are points.
"""

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
    axes: dict[str, Axis]  # a key that a condition refers to comes before the key with the condition
    whole: frozenset[str]  # keys whose values are integers

    def is_active(self, key: str, point: Point) -> bool:
        """Whether a key's conditions hold, given the values of the keys before it."""
        for other, allowed in self.axes[key].when.items():
            value = point.get(other) if other in self.axes else value_of(self.base, other)
            if value not in allowed:
                return False
        return True

    def draw(self, rng: np.random.Generator) -> Point:
        """A random point; log axes are uniform in the logarithm."""
        point: Point = {}
        for key in self.axes:
            if self.is_active(key, point):
                point[key] = self._draw_value(key, rng)
        return point

    def _draw_value(self, key: str, rng: np.random.Generator) -> Any:
        return self.at(key, float(rng.random()))

    def at(self, key: str, position: float) -> Any:
        """The value of a key at a position in [0, 1): of equally many positions for each value, or for each part of its range."""
        axis, values = self.axes[key], self.values(key)
        if values is not None and not axis.log:
            return values[int(position * len(values))]
        assert axis.low is not None and axis.high is not None
        low, high = (math.log(axis.low), math.log(axis.high)) if axis.log else (axis.low, axis.high)
        value = low + position * (high - low)
        return self.clip(key, math.exp(value) if axis.log else value)

    def position(self, key: str, value: Any) -> float:
        """A position in [0, 1] at which `value` lies."""
        axis, values = self.axes[key], self.values(key)
        if values is not None and not axis.log:
            return (values.index(value) + 0.5) / len(values)
        assert axis.low is not None and axis.high is not None
        low, high = (math.log(axis.low), math.log(axis.high)) if axis.log else (axis.low, axis.high)
        return ((math.log(value) if axis.log else value) - low) / (high - low)

    def clip(self, key: str, value: Any) -> Any:
        """A number moved into its range, and rounded if the key is an integer."""
        axis = self.axes[key]
        if axis.low is None or axis.high is None:
            return value
        inside = min(max(value, axis.low), axis.high)
        return round(inside) if key in self.whole else float(inside)

    def values(self, key: str) -> list[Any] | None:
        """All values of a key, in order; None for a continuous range."""
        axis = self.axes[key]
        if axis.choices is not None:
            return axis.choices
        assert axis.low is not None and axis.high is not None
        step = axis.step or (1.0 if key in self.whole else None)
        if step is None:
            return None
        count = math.floor((axis.high - axis.low) / step + 1e-9) + 1  # 0.3 / 0.1 is 2.9999999999999996
        numbers = [axis.low + i * step for i in range(count)]
        return [round(n) for n in numbers] if key in self.whole else [float(f"{n:.12g}") for n in numbers]

    def grid(self) -> Iterator[Point]:
        """Every point once, the last key fastest. Every key must have `values`."""
        seen: list[Point] = []
        conditional = any(axis.when for axis in self.axes.values())
        known = {key: self.values(key) or [] for key in self.axes}
        for combination in itertools.product(*known.values()):
            point: Point = {}
            for key, value in zip(known, combination, strict=True):
                if self.is_active(key, point):
                    point[key] = value
            if conditional:  # combinations that differ in an inactive key only are the same point
                if point in seen:
                    continue
                seen.append(point)
            yield point

    def config(self, point: Point) -> Config:
        """The configuration at a point. Raises ConfigError when its values are not valid together."""
        return with_values(self.base, point, where=show(point))

    def valid(self, point: Point) -> bool:
        try:
            self.config(point)
        except ConfigError:
            return False
        return True


def value_of(config: Config, dotted: str) -> Any:
    """The value of a dotted key. Raises AttributeError when there is no such key."""
    value: Any = config
    for name in dotted.split("."):
        value = getattr(value, name)
    return value


def show(point: Point) -> str:
    """'model.dim=64 optim.learning_rate=0.00123'"""
    return " ".join(f"{key}={plain(value)}" for key, value in point.items())


def plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
