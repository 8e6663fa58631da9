"""Splitting events into train, validation and test: by time, by a random share, or as given."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np

from recray import log
from recray.config import SplitConfig
from recray.config.data import DURATION
from recray.data.hashing import mix
from recray.errors import ConfigError, DataError
from recray.ids import SPLITS

_UNITS = {"d": 86_400_000_000, "h": 3_600_000_000, "m": 60_000_000, "s": 1_000_000}


def before(split: str) -> tuple[str, ...]:
    """The splits whose events are known when this one is evaluated."""
    return SPLITS[: SPLITS.index(split)]


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


@dataclass(frozen=True)
class Draw:
    """A random share of train events for validation. It depends on the event alone, not on how events are partitioned."""

    share: float
    seed: int

    def chosen(self, order: np.ndarray) -> np.ndarray:
        """(E,) bool of events by their unique `order`."""
        salt = mix(np.array([self.seed], np.uint64))
        return np.asarray(mix(order.astype(np.int64).view(np.uint64) ^ salt).astype(np.float64) / 2.0**64 < self.share)


def draw(config: SplitConfig, num_valid: int, seed: int) -> Draw | None:
    """What to draw for split.kind 'given'; None if validation events are given."""
    if config.kind != "given" or num_valid:
        return None
    if isinstance(config.valid, str) or not 0 < config.valid < 1:
        raise ConfigError(
            f"data.split.valid = {config.valid!r}: with split 'given' and no validation events it is the fraction of train "
            f"events to draw, between 0 and 1; or name data.split.valid_path"
        )
    return Draw(config.valid, seed)


def duration(text: str) -> int:
    """Microseconds of '7d', '12h', '30m' or '45s'."""
    match = DURATION.fullmatch(text.strip())
    if not match:
        raise ConfigError(f"{text!r} is not a duration: write a number and d, h, m or s, for example '7d' or '12h'")
    return int(float(match[1]) * _UNITS[match[2]])


def temporal(config: SplitConfig, edges: np.ndarray, counts: np.ndarray, has_time: bool = True) -> Boundaries:
    """Boundaries from a histogram of event times: counts[i] events lie in [edges[i], edges[i + 1]).

    A fraction is met to within one bin, from below for test. Raises ConfigError for boundaries that these events cannot have.
    """
    timed = [n for n in ("start", "valid_start", "test_start", "end") if getattr(config, n) is not None]
    timed += [n for n in ("valid", "test") if isinstance(getattr(config, n), str)]
    if timed and not has_time:
        raise ConfigError(
            f"data.split.{timed[0]} needs times, and the events have positions only: use fractions, "
            f"or set data.columns.timestamp and data.timestamp_unit"
        )
    last = int(edges[-1])
    end = microseconds(config.end) if config.end else last
    inside = edges[:-1] < end
    cumulative = np.cumsum(counts * inside)
    test_start = _start(config.test_start, config.test, end, edges, cumulative, "test")
    if config.end is None:
        end = max(end, test_start)  # a test period after the last event is empty, which `check` explains
    before = edges[:-1] < test_start
    valid_start = _start(
        config.valid_start, config.valid, test_start, edges, np.cumsum(counts * before), "valid", cumulative[-1]
    )
    if not valid_start <= test_start <= end:
        raise ConfigError(
            f"data.split: validation would start at {_shown(valid_start, has_time)}, test at {_shown(test_start, has_time)} "
            f"and the end is {_shown(end, has_time)}: they must come in this order"
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
        return microseconds(moment)
    if isinstance(share, str):
        return until - duration(share)
    if not 0 < share < 1:
        raise ConfigError(
            f"data.split.{name} = {share}: a fraction must lie between 0 and 1; or write a duration such as '7d'"
        )
    wanted = cumulative[-1] - share * (cumulative[-1] if total is None else total)
    return int(edges[np.searchsorted(cumulative, wanted, side="left") + 1])


def microseconds(moment: datetime) -> int:
    """Microseconds since 1970. A time without a zone is taken as UTC."""
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (aware - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


@dataclass(frozen=True)
class Range:
    """Times of the log's events, and how they are divided."""

    first: int
    last: int
    boundaries: Boundaries | None
    has_time: bool
    ties: str = ""  # a sentence from `ties`


def ties(counts: np.ndarray) -> str:
    """A sentence for logs whose events share their times, such as dates; empty for others. counts: as for `temporal`."""
    distinct, most, total = int((counts > 0).sum()), int(counts.max()), int(counts.sum())
    if distinct > 1_000 and most < 0.05 * total:
        return ""
    if distinct < len(SPLITS):
        return (
            f" Events have no more than {distinct} times, which cannot be divided: use data.split.kind = 'leave_last'."
        )
    return (
        f" Events have {distinct:,} distinct times, {most:,} of {total:,} share one of them, and events of the same time are "
        f"never divided: write shares as durations such as '1d', name data.split.valid_start and data.split.test_start, or use "
        f"data.split.kind = 'leave_last'."
    )


def check(sizes: dict[str, int], found: Range, label: str | None, weight: str | None) -> None:
    """Raise DataError if a split is empty or nothing in it is chosen, or if there is nothing to learn from; warn of a split
    whose metrics cannot be computed.

    sizes: of each split events_ (chosen), shown_ (all) and weightless_ (chosen, of weight 0). label, weight: their columns.
    """
    for name in SPLITS:
        chosen, shown = sizes[f"events_{name}"], sizes[f"shown_{name}"]
        if shown and not chosen:
            raise DataError(
                f"no events fall in {name} that were chosen: all {shown:,} have label 0; check data.columns.label ({label!r}) "
                f"and data.split"
            )
    _check_empty(sizes, found)
    for name in SPLITS:
        chosen, shown, weightless = (sizes[f"{key}_{name}"] for key in ("events", "shown", "weightless"))
        if label and chosen == shown:
            log.warning(
                "prepare",
                f"all {shown:,} events of {name} have label 1 (data.columns.label = {label!r}): a ranker has nothing to "
                f"tell apart there; give shown events with label 0, or draw them by data.negatives without data.columns.label",
            )
        if weightless == chosen and name == "train":
            raise DataError(
                f"all {chosen:,} chosen events of train have weight 0 (data.columns.weight = {weight!r}), so that nothing "
                f"can be learned: fix the column, or leave out data.columns.weight"
            )
        if weightless:
            log.warning(
                "prepare",
                f"{weightless:,} of {chosen:,} chosen events of {name} have weight 0 (data.columns.weight = {weight!r}): they "
                f"count neither in the loss nor in click metrics",
            )


def _check_empty(sizes: dict[str, int], found: Range) -> None:
    first, last, boundaries, has_time = found.first, found.last, found.boundaries, found.has_time
    empty = [name for name in SPLITS if not sizes[f"events_{name}"]]
    if not empty:
        return
    there = ", ".join(f"{name} {sizes[f'events_{name}']:,}" for name in SPLITS)
    said = f"no events fall in {', '.join(empty)} ({there})."
    if boundaries is None:
        raise DataError(
            f"{said} Check data.split: leave_last needs users with 3 events, 'given' needs files or a column of splits"
        )
    raise DataError(
        f"{said} Events run from {_shown(first, has_time)} to {_shown(last, has_time)}; validation starts at "
        f"{_shown(boundaries.valid_start, has_time)}, test at {_shown(boundaries.test_start, has_time)}, and the end is "
        f"{_shown(boundaries.end, has_time)}.{found.ties} Set data.split.valid and data.split.test (fractions or "
        f"durations), and check data.timestamp_unit"
    )


def _shown(moment: int, has_time: bool) -> str:
    """A time in ISO form, or a position."""
    if not has_time:
        return str(moment)
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=moment)).isoformat(timespec="seconds")
