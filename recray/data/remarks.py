"""What prepare says of the events of a log: duplicates, dropped users, repeats. counts: those of the dataset's record."""

from __future__ import annotations

from collections.abc import Iterator

from recray import log
from recray.config import DataConfig
from recray.data.user_rows import DUPLICATES
from recray.ids import SPLITS


def say(config: DataConfig, counts: dict[str, int]) -> None:
    for line in _lines(config, counts):
        log.info("prepare", line)


def _lines(config: DataConfig, counts: dict[str, int]) -> Iterator[str]:
    dropped, weaker, lighter = (counts[name] for name in DUPLICATES)
    if dropped:
        same = "user, item and time" if config.columns.timestamp else "user and item"
        more = [f"{weaker:,} were not chosen where the kept one is"] * (weaker > 0)
        more += [f"{lighter:,} have a smaller weight"] * (lighter > 0)
        yield f"{dropped:,} duplicates dropped (same {same})" + (f": {', '.join(more)}" if more else "")
    if users := counts["users_dropped_min_count"]:
        yield (
            f"{users:,} users with fewer than {config.min_user_events} train events dropped, with "
            f"{counts['events_dropped_min_count']:,} events"
        )
    if any(counts[f"repeats_{name}"] for name in SPLITS):
        shares = (f"{counts[f'repeats_{name}'] / max(counts[f'events_{name}'], 1):.1%} of {name}" for name in SPLITS)
        yield f"events whose user had chosen the item before: {', '.join(shares)}"
