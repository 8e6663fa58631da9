"""By recent events as of each query's time: the counter that a site with such a log can keep.

With the window w, an item's score for a query at time t is the number of events at t - w <= time < t; with the half-life h
it is the sum of 2^-((t - time) / h) over all events at time < t. Events of the evaluated split, those of
other users among them, count once they have happened: unlike a model with frozen weights, the list changes in the split.

    events   t = 1: a   2: b   3: b   6: c        window 4
    query    t = 4: b 2, a 1                      t = 7: b 1, c 1 (those at 1 and 2 have left; b is first by its id)

All queries of a block are answered together: events and queries are sorted by time, each query's row holds what enters and
leaves between the query before it and itself, and the cumulative sum over the rows gives every query's counts.

Shape legend: B queries, E events, N items, K places.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from recray.config.baselines import RollingPopularityOptions as Options
from recray.data.dataset import PreparedDataset
from recray.data.split import before, duration
from recray.errors import NotApplicableError
from recray.ids import FIRST_ITEM, PAD
from recray.loading.collate import EvalQuery
from recray.retrieval.events import iter_events
from recray.retrieval.exact import best_of

_ENTRIES = 1 << 23  # scores in memory at a time (64 MB in float64)
# Half-lives. Weights are powers of two relative to the start of the query's span, which float64 holds up to 1,022; what is
# older than _FORGOTTEN at that start has no weight.
_SPAN, _FORGOTTEN = 256, 512


class RollingPopularity:
    """Counts or decayed counts of the events before each query. time_E, item_E: all events, in any order."""

    def __init__(
        self, time_E: np.ndarray, item_E: np.ndarray, num_items: int, window: int | None, half_life: int
    ) -> None:
        """window: length in the unit of the times; if it is None, half_life is."""
        order = np.argsort(time_E, kind="stable")
        self._time_E, self._item_E, self._num_items = time_E[order], item_E[order], num_items
        self._window, self._half_life = window, half_life

    def recommend(self, query: EvalQuery, k: int, exclude_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        # In order of time, so that the blocks of a large catalogue read disjoint events.
        order = torch.argsort(query.time_B, stable=True)
        ids, scores = [], []
        head = k + int(query.seen.lengths().max()) if exclude_seen else k
        for rows in order.split(max(1, _ENTRIES // self._num_items)):
            time_B = query.time_B[rows].numpy()
            # Columns are items in order of id: all with a score, and enough of the first ones to fill every list.
            item_A = self._active(time_B, FIRST_ITEM + head)
            scores_BA = torch.from_numpy(self._scores(time_B, item_A).astype(np.float32))
            scores_BA[:, item_A < FIRST_ITEM] = -torch.inf
            if exclude_seen:
                seen = query.seen.take(rows)
                column = torch.from_numpy(np.searchsorted(item_A, seen.values.numpy())).clamp(max=len(item_A) - 1)
                here = torch.from_numpy(item_A)[column] == seen.values
                scores_BA[seen.row_index()[here], column[here]] = -torch.inf
            found, best = best_of(scores_BA, k)
            ids.append(torch.where(best == -torch.inf, PAD, torch.from_numpy(item_A)[found]))
            scores.append(best)
        back = torch.argsort(order)
        return torch.cat(ids)[back].numpy(), torch.cat(scores)[back].numpy()

    def scores(self, time_B: np.ndarray) -> np.ndarray:
        """(B, N) score of every item for queries at these times."""
        return self._scores(time_B, np.arange(self._num_items))

    def _active(self, time_B: np.ndarray, head: int) -> np.ndarray:
        """The first `head` items, and all with an event that counts for a query at these times; in order."""
        age = self._window if self._window is not None else (_SPAN + _FORGOTTEN) * self._half_life
        first, until = self._first_at(np.array([time_B.min() - age, time_B.max()]))
        active_N = np.zeros(self._num_items, bool)
        active_N[:head] = True
        active_N[self._item_E[first:until]] = True
        return np.flatnonzero(active_N)

    def _scores(self, time_B: np.ndarray, item_A: np.ndarray) -> np.ndarray:
        """(B, A) scores of these items, which must contain all of `_active`."""
        column_N = np.zeros(self._num_items, np.int64)
        column_N[item_A] = np.arange(len(item_A))
        out_BA = np.empty((len(time_B), len(item_A)))
        for rows in self._spans(time_B):
            time = time_B[rows]
            counted = self._window_counts if self._window is not None else self._decayed
            out_BA[rows] = counted(time, column_N, len(item_A))
        return out_BA

    def _spans(self, time_B: np.ndarray) -> Iterator[np.ndarray]:
        """Indices of queries that are answered together, each time in order of time."""
        order = np.argsort(time_B, kind="stable")
        if self._window is not None:
            yield order
            return
        span_B = time_B[order] // (_SPAN * self._half_life)
        yield from np.split(order, np.flatnonzero(np.diff(span_B)) + 1)

    def _window_counts(self, time_B: np.ndarray, column_N: np.ndarray, size: int) -> np.ndarray:
        assert self._window is not None
        enter, leave = self._first_at(time_B), self._first_at(time_B - self._window)
        column_E = column_N[self._item_E[leave[0] : enter[-1]]]
        counts_BA = _per_row(leave[0], enter, column_E, np.ones(len(column_E)), size)
        left = leave[-1] - leave[0]
        counts_BA -= _per_row(leave[0], leave, column_E[:left], np.ones(left), size)
        return np.asarray(np.cumsum(counts_BA, axis=0, out=counts_BA))

    def _decayed(self, time_B: np.ndarray, column_N: np.ndarray, size: int) -> np.ndarray:
        start = time_B[0] // (_SPAN * self._half_life) * (_SPAN * self._half_life)
        first, until = int(self._first_at(start - _FORGOTTEN * self._half_life)), self._first_at(time_B)
        weight_E = np.exp2((self._time_E[first : until[-1]] - start) / self._half_life)
        sums_BA = _per_row(first, until, column_N[self._item_E[first : until[-1]]], weight_E, size)
        np.cumsum(sums_BA, axis=0, out=sums_BA)
        return np.asarray(sums_BA * np.exp2((start - time_B) / self._half_life)[:, None])

    def _first_at(self, time: np.ndarray | int) -> np.ndarray:
        """Index of the first event at or after each time."""
        return np.asarray(np.searchsorted(self._time_E, time, side="left"))


def _per_row(first: int, until_B: np.ndarray, column_E: np.ndarray, weight_E: np.ndarray, size: int) -> np.ndarray:
    """(B, size) sums of weights by column of the events first to until_B[0], until_B[0] to until_B[1], and so on.

    column_E, weight_E: of the events first to until_B[-1].
    """
    row_E = np.repeat(np.arange(len(until_B)), np.diff(until_B, prepend=first))
    return np.bincount(row_E * size + column_E, weight_E, minlength=len(until_B) * size).reshape(len(until_B), -1)


def build(options: Options, dataset: PreparedDataset, split: str) -> RollingPopularity:
    """By the events of this split and of those before it. Raises NotApplicableError for a log without times."""
    record = dataset.record
    if not record.has_time:
        raise NotApplicableError("the log has no times: it needs data.columns.timestamp and data.timestamp_unit")
    window = None if options.half_life else duration(options.window or "1h")
    half_life = duration(options.half_life) if options.half_life else 0
    times, items = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for _, item, time in iter_events(dataset, (*before(split), split)):
        kept = item >= FIRST_ITEM
        if window is not None and f"{split}_start" in record.split:  # no query is earlier
            kept &= time >= record.starts(split) - window
        times.append(time[kept])
        items.append(item[kept])
    return RollingPopularity(np.concatenate(times), np.concatenate(items), record.num_items, window, half_life)
