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
from recray.ids import FIRST_ITEM
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
        for rows in order.split(max(1, _ENTRIES // self._num_items)):
            scores_BN = torch.from_numpy(self.scores(query.time_B[rows].numpy()).astype(np.float32))
            scores_BN[:, :FIRST_ITEM] = -torch.inf
            if exclude_seen:
                seen = query.seen.take(rows)
                scores_BN[seen.row_index(), seen.values] = -torch.inf
            found, best = best_of(scores_BN, k)
            ids.append(found)
            scores.append(best)
        back = torch.argsort(order)
        return torch.cat(ids)[back].numpy(), torch.cat(scores)[back].numpy()

    def scores(self, time_B: np.ndarray) -> np.ndarray:
        """(B, N) score of every item for queries at these times."""
        out_BN = np.empty((len(time_B), self._num_items))
        for rows in self._spans(time_B):
            out_BN[rows] = (
                self._window_counts(time_B[rows]) if self._window is not None else self._decayed(time_B[rows])
            )
        return out_BN

    def _spans(self, time_B: np.ndarray) -> Iterator[np.ndarray]:
        """Indices of queries that are answered together, each time in order of time."""
        order = np.argsort(time_B, kind="stable")
        if self._window is not None:
            yield order
            return
        span_B = time_B[order] // (_SPAN * self._half_life)
        yield from np.split(order, np.flatnonzero(np.diff(span_B)) + 1)

    def _window_counts(self, time_B: np.ndarray) -> np.ndarray:
        assert self._window is not None
        enter, leave = self._first_at(time_B), self._first_at(time_B - self._window)
        counts_BN = self._per_row(leave[0], enter, np.ones(enter[-1] - leave[0]))
        counts_BN -= self._per_row(leave[0], leave, np.ones(leave[-1] - leave[0]))
        return np.asarray(np.cumsum(counts_BN, axis=0, out=counts_BN))

    def _decayed(self, time_B: np.ndarray) -> np.ndarray:
        start = time_B[0] // (_SPAN * self._half_life) * (_SPAN * self._half_life)
        first, until = int(self._first_at(start - _FORGOTTEN * self._half_life)), self._first_at(time_B)
        weight_E = np.exp2((self._time_E[first : until[-1]] - start) / self._half_life)
        sums_BN = self._per_row(first, until, weight_E)
        np.cumsum(sums_BN, axis=0, out=sums_BN)
        return np.asarray(sums_BN * np.exp2((start - time_B) / self._half_life)[:, None])

    def _first_at(self, time: np.ndarray | int) -> np.ndarray:
        """Index of the first event at or after each time."""
        return np.asarray(np.searchsorted(self._time_E, time, side="left"))

    def _per_row(self, first: int, until_B: np.ndarray, weight_E: np.ndarray) -> np.ndarray:
        """(B, N) sums of weights by item of the events first to until_B[0], until_B[0] to until_B[1], and so on."""
        row_E = np.repeat(np.arange(len(until_B)), np.diff(until_B, prepend=first))
        cell_E = row_E * self._num_items + self._item_E[first : until_B[-1]]
        return np.bincount(cell_E, weight_E, minlength=len(until_B) * self._num_items).reshape(len(until_B), -1)


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
