"""Pictures of a sweep as inline SVG."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import Any

_WIDTH, _HEIGHT = 960, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 16, 46
_GRID = "#e3e8ed"
_LETTER = 7  # width of one
_NO_VALUE = "-"  # of a key whose condition did not hold


@dataclass(frozen=True)
class Line:
    points: list[tuple[float, float]]
    colour: str
    step: bool = False  # goes level, then up
    wide: bool = False
    dot: bool = False  # marks the end


@dataclass(frozen=True)
class Axis:
    """One axis of parallel coordinates: a value for every trial, None where the key did not count."""

    name: str
    values: list[Any]
    log: bool


def lines(drawn: list[Line], x_name: str, y_name: str, from_zero: bool = False) -> str:
    """Curves over a common pair of axes."""
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points if math.isfinite(y)]
    if not ys:
        return "<p>no trial ended an epoch</p>"
    x_ticks, y_ticks = _ticks(0.0 if from_zero else min(xs), max(xs)), _ticks(min(ys), max(ys))
    x_low, x_high = (0.0 if from_zero else min(xs)), max(xs)
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def x_at(x: float) -> float:
        return _LEFT + (x - x_low) / ((x_high - x_low) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def y_at(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - y_low) / ((y_high - y_low) or 1) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y_at(y):.1f}" y2="{y_at(y):.1f}" stroke="{_GRID}"/>'
        + _text(_LEFT - 8, y_at(y) + 4, f"{y:.4g}", "end")
        for y in y_ticks
    ]
    parts += [_text(x_at(x), _HEIGHT - _BOTTOM + 18, f"{x:.4g}", "middle") for x in x_ticks if x_low <= x <= x_high]
    for line in drawn:
        at = [(x_at(x), y_at(y)) for x, y in line.points if math.isfinite(y)]
        path = f"M{at[0][0]:.1f} {at[0][1]:.1f}" if at else ""
        for x, y in at[1:]:
            path += f"H{x:.1f}V{y:.1f}" if line.step else f"L{x:.1f} {y:.1f}"
        width = 2.6 if line.wide else 1.3
        parts.append(f'<path d="{path}" fill="none" stroke="{line.colour}" stroke-width="{width}"/>')
        if at and (line.dot or len(at) == 1):
            parts.append(f'<circle cx="{at[-1][0]:.1f}" cy="{at[-1][1]:.1f}" r="3" fill="{line.colour}"/>')
    parts.append(_text((_LEFT + _WIDTH) / 2, _HEIGHT - 8, x_name, "middle"))
    parts.append(_text(_LEFT, _TOP - 4, y_name, "start"))
    return _svg(_HEIGHT, parts)


def parallel(axes: list[Axis], rows: list[tuple[int, str, bool]]) -> str:
    """Trials as lines over one axis a key; `rows` are (place in the axes' values, colour, wide), the last drawn on top."""
    top, bottom, left, right = 44, _HEIGHT - 24, 70, _WIDTH - 70
    gap = (right - left) / max(1, len(axes) - 1)
    parts: list[str] = []
    labels: list[str] = []
    heights: list[list[float]] = []
    for at, axis in enumerate(axes):
        x = left + at * gap
        share, marks = _scale(axis)
        heights.append([bottom - one * (bottom - top) for one in share])
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="#8895a3"/>')
        # Names would run into each other on one line.
        labels.append(_text(x, top - 26 + 13 * (at % 2), axis.name, "middle"))
        fit = max(3, int((gap - 8) / _LETTER))
        labels += [_text(x + 5, bottom - place * (bottom - top) + 4, mark[:fit], "start") for place, mark in marks]
    for place, colour, wide in rows:
        points = " ".join(f"{left + at * gap:.1f},{ys[place]:.1f}" for at, ys in enumerate(heights))
        look = 'stroke-width="2.6"' if wide else 'stroke-width="1.2" opacity="0.75"'
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" {look}/>')
    return _svg(_HEIGHT, parts + labels)


def importance_bars(shares: dict[str, float]) -> str:
    """A bar a key."""
    if not shares:
        return "<p>too few trials to say</p>"
    row, left = 26, 230
    parts = []
    for at, (key, share) in enumerate(shares.items()):
        y = 8 + at * row
        width = max(1.0, share * (_WIDTH - left - 80))
        parts.append(_text(left - 10, y + 14, key, "end"))
        parts.append(f'<rect x="{left}" y="{y}" width="{width:.1f}" height="18" fill="#2a6fb0"/>')
        parts.append(_text(left + width + 8, y + 14, f"{share:.0%}", "start"))
    return _svg(16 + row * len(shares), parts)


def _scale(axis: Axis) -> tuple[list[float], list[tuple[float, str]]]:
    """Each value's height in [0, 1], and (height, label) of marks. A missing value has a place of its own at the foot."""
    known = [value for value in axis.values if value is not None]
    missing = bool(known) and len(known) < len(axis.values)
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in known)
    foot = 0.12 if missing else 0.0
    marks = [(0.0, _NO_VALUE)] if missing else []
    distinct = sorted(set(known)) if numbers else sorted({str(value) for value in known})
    if numbers and len(distinct) > 6:
        low, high = float(min(known)), float(max(known))
        turn = math.log if axis.log and low > 0 else float
        span = turn(high) - turn(low)
        places = {
            value: foot + (1 - foot) * ((turn(float(value)) - turn(low)) / span if span else 0.5) for value in known
        }
        if axis.log and low > 0:
            middle = math.sqrt(low * high)
        else:
            middle = (low + high) / 2
        marks += [(foot, f"{low:.3g}"), (foot + (1 - foot) / 2, f"{middle:.3g}"), (1.0, f"{high:.3g}")]
        return [places[v] if v is not None else 0.0 for v in axis.values], marks
    steps = max(1, len(distinct) - 1)
    heights = {
        str(value): foot + (1 - foot) * (at / steps if len(distinct) > 1 else 0.5) for at, value in enumerate(distinct)
    }
    marks += [(height, f"{float(name):.4g}" if numbers else name) for name, height in heights.items()]
    return [heights[str(v)] if v is not None else 0.0 for v in axis.values], marks


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers over a range."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = math.floor(low / step)
    return [round((first + i) * step, 12) for i in range(math.ceil(high / step) - first + 1)]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(height: int, parts: list[str]) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img">{"".join(parts)}</svg>'
