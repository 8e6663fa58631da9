"""Metrics by group: of queries by how much of the user is known, of targets by popularity and age of the item.

A target that is no known item is in a group of its own: no list can hold it. Intervals resample users; a gain is the
difference of two systems on the same resampled users.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.ids import FIRST_ITEM
from recray.metrics import ranking
from recray.records import Interval, Slice
from recray.retrieval.events import iter_events

# Groups are [edge, next edge); what lies below the first edge is in none.
_EVENTS = (1, 2, 5, 10, 20, 50, 100, 500)
_COUNTS = (1, 10, 100, 1_000, 10_000, 100_000)
_HOUR = 3_600_000_000
_AGES = {
    "under 1 hour": 0,
    "1 to 6 hours": _HOUR,
    "6 to 24 hours": 6 * _HOUR,
    "1 to 7 days": 24 * _HOUR,
    "7 to 30 days": 7 * 24 * _HOUR,
    "30 days and more": 30 * 24 * _HOUR,
}
UNKNOWN_ITEM = "unknown item"


def first_seen(dataset: PreparedDataset, splits: Sequence[str]) -> np.ndarray | None:
    """(N,) when each item was first chosen, in microseconds; None if the log has no times."""
    if not dataset.record.has_time:
        return None
    first_N = np.full(dataset.record.num_items, np.iinfo(np.int64).max)
    for _, item, time in iter_events(dataset, splits):
        np.minimum.at(first_N, item, time)
    return first_N


def of_counts(values: np.ndarray, edges: Sequence[int] = _COUNTS) -> Iterator[tuple[str, np.ndarray]]:
    """(name of a group, mask of its entries), of groups of whole numbers that have any."""
    for at, edge in enumerate(edges):
        last = edges[at + 1] - 1 if at + 1 < len(edges) else None
        mask = (values >= edge) & (True if last is None else values <= last)
        name = f"{edge:,} and more" if last is None else f"{edge:,}" if last == edge else f"{edge:,} to {last:,}"
        if mask.any():
            yield name, mask


def of_histories(lengths: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Groups of queries by the number of events that are known of the user."""
    return of_counts(lengths, _EVENTS)


def _of_items(item_T: np.ndarray, counts_N: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    known = item_T >= FIRST_ITEM
    if not known.all():
        yield UNKNOWN_ITEM, ~known
    yield from of_counts(np.where(known, counts_N[item_T], -1))


def _of_ages(item_T: np.ndarray, age_T: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    known = item_T >= FIRST_ITEM
    if not known.all():
        yield UNKNOWN_ITEM, ~known
    starts = list(_AGES.values())
    group_T = np.searchsorted(starts, np.maximum(age_T, 0), side="right") - 1
    for at, name in enumerate(_AGES):
        if (mask := known & (group_T == at)).any():
            yield name, mask


def by_history(
    columns: Mapping[str, np.ndarray], length_B: np.ndarray, user_B: np.ndarray, config: Config, metric: str, sign: int
) -> list[Slice]:
    """columns: system -> (B,) values of `metric`. sign: -1 where lower values are better."""
    groups = of_histories(length_B)
    return [of_group("history", name, metric, columns, mask, user_B, config, sign) for name, mask in groups]


def by_item(
    found: Mapping[str, np.ndarray],
    item_T: np.ndarray,
    age_T: np.ndarray | None,
    user_T: np.ndarray,
    counts_N: np.ndarray,
    config: Config,
    k: int,
) -> list[Slice]:
    """found: system -> (T,) whether each target is among its first k items. age_T: microseconds since it was first chosen."""
    values = {name: one.astype(np.float64) for name, one in found.items()}
    groups = [("popularity", *group) for group in _of_items(item_T, counts_N)]
    if age_T is not None:
        groups += [("age", *group) for group in _of_ages(item_T, age_T)]
    return [of_group(by, name, f"found@{k}", values, mask, user_T, config, 1) for by, name, mask in groups]


def of_group(
    by: str,
    group: str,
    metric: str,
    columns: Mapping[str, np.ndarray],
    mask: np.ndarray,
    user: np.ndarray,
    config: Config,
    sign: int,
) -> Slice:
    """Means of one group, and how much better the model is there than each other system."""
    values_BM = np.stack([column[mask] for column in columns.values()], axis=1)
    names = list(columns)
    model_B = values_BM[:, names.index("model")]
    both = np.concatenate([values_BM, sign * (model_B[:, None] - values_BM)], axis=1)
    intervals = _intervals(both, user[mask], config)
    gains = dict(zip(names, intervals[len(names) :], strict=True))
    del gains["model"]
    values = dict(zip(names, intervals, strict=False))
    return Slice(by=by, group=group, metric=metric, size=int(mask.sum()), values=values, gains=gains)


def _intervals(values_BM: np.ndarray, user: np.ndarray, config: Config) -> list[Interval]:
    means, resamples = values_BM.mean(axis=0).tolist(), config.evaluation.bootstrap
    if not resamples:
        return [Interval(value=mean) for mean in means]
    low, high = ranking.bootstrap(values_BM, resamples, config.run.seed, user)
    return [Interval(value=mean, low=a, high=b) for mean, a, b in zip(means, low.tolist(), high.tolist(), strict=True)]
