"""Where train ends and test begins."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from recray.config import SplitConfig
from recray.errors import ConfigError, DataError

_UNITS = {"d": 86_400_000_000, "h": 3_600_000_000, "m": 60_000_000, "s": 1_000_000}


@dataclass(frozen=True)
class Boundaries:
    """Microseconds (or positions): train < valid_start <= valid < test_start <= test < end."""

    valid_start: int
    test_start: int
    end: int

    def codes(self, time: np.ndarray) -> np.ndarray:
        """0 train, 1 valid, 2 test, 3 after the end."""
        edges = np.array([self.valid_start, self.test_start, self.end], np.int64)
        return np.searchsorted(edges, time, side="right").astype(np.int8)


def duration(text: str) -> int:
    """Microseconds of '7d', '12h', '30m' or '45s'."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([dhms])", text.strip())
    if not match:
        raise ConfigError(f"{text!r} is not a duration: write a number and d, h, m or s, for example '7d' or '12h'")
    return int(float(match[1]) * _UNITS[match[2]])


def temporal(config: SplitConfig, edges: np.ndarray, counts: np.ndarray) -> Boundaries:
    """Boundaries from a histogram of event times: counts[i] events lie in [edges[i], edges[i + 1])."""
    last = int(edges[-1])
    end = _microseconds(config.end) if config.end else last
    inside = edges[:-1] < end
    cumulative = np.cumsum(counts * inside)
    test_start = _start(config.test_start, config.test, end, edges, cumulative, "test")
    before = edges[:-1] < test_start
    valid_start = _start(
        config.valid_start, config.valid, test_start, edges, np.cumsum(counts * before), "valid", cumulative[-1]
    )
    return Boundaries(valid_start, test_start, end)


def _start(
    moment: datetime | None,
    share: float | str,
    until: int,
    edges: np.ndarray,
    cumulative: np.ndarray,
    name: str,
    total: float | None = None,
) -> int:
    """The first microsecond of a period that ends at `until`."""
    if moment is not None:
        return _microseconds(moment)
    if isinstance(share, str):
        return until - duration(share)
    if not 0 < share < 1:
        raise ConfigError(
            f"data.split.{name} = {share}: a fraction must lie between 0 and 1; or write a duration such as '7d'"
        )
    wanted = cumulative[-1] - share * (cumulative[-1] if total is None else total)
    return int(edges[np.searchsorted(cumulative, wanted, side="left") + 1])


def _microseconds(moment: datetime) -> int:
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return int(aware.timestamp() * 1e6)


def check(counts: dict[str, int], first: int, last: int, boundaries: Boundaries | None, has_time: bool) -> None:
    """Refuse a split that leaves a part empty. Raises DataError that shows the range and the boundaries."""
    empty = [name for name in ("train", "valid", "test") if not counts[f"events_{name}"]]
    if not empty:
        return
    said = f"no events fall in {', '.join(empty)}: train {counts['events_train']}, valid {counts['events_valid']}, test {counts['events_test']}."
    if boundaries is None:
        raise DataError(
            f"{said} Check data.split (users need 3 events for leave_last; 'given' needs files or a split column)"
        )
    show = _iso if has_time else str
    raise DataError(
        f"{said} Events run from {show(first)} to {show(last)}; validation starts at {show(boundaries.valid_start)}, test at "
        f"{show(boundaries.test_start)}, and the end is {show(boundaries.end)}. Set data.split.valid and data.split.test "
        f"(fractions or durations), and check data.timestamp_unit"
    )


def _iso(microseconds: int) -> str:
    return datetime.fromtimestamp(microseconds / 1e6, UTC).isoformat(timespec="seconds")
