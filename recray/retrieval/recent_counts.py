"""What was chosen recently, as of each query's time: counts of items, and of items right after the user's last ones.

    P(i | user, t) = sum over the last L items a of w_a (n(a, i) + m p(i)) / (n(a) + m)

p(i) is the share of item i among the events of the `popularity_window` before t; n(a, i) counts how often users chose i right
after a in the `window` before t, n(a) is its sum over i, and m the `smoothing`. Weights w_a halve with each step back from the
last item. For a user without items, and for items that nobody chose recently, P is p. Only events before t are counted,
including those of other users in the evaluated split.

    events (user, item, time)   Ann a 1, Ann b 2, Bob c 3        query of Bob at t = 4, windows 4, m = 1
    p: a 1/3, b 1/3, c 1/3      no event follows c, so P = p;  for a user with the history (a): P(b) = (1 + 1/3) / 2

Every event has a place in the order of time, so that (item, place) and (pair of items, place) are numbers: sorted once, each
count is the difference of two binary searches.

Shape legend: B queries, C (query, item) pairs, E events, K places, L last items.
"""

from __future__ import annotations

import numpy as np
import torch

from recray.config.baselines import RecentCountsOptions
from recray.data.dataset import PreparedDataset
from recray.data.split import duration
from recray.errors import NotApplicableError
from recray.ids import FIRST_ITEM, PAD
from recray.loading.collate import EvalQuery
from recray.loading.jagged import range_index
from recray.retrieval.events import Steps, read_steps

_POPULAR, _FOLLOWING = 100, 200  # candidates of a query: popular items, and latest choices after each of its last items
_TICKS = 60  # popular items are found anew after this part of their window
_LEAST = 1e-6  # share of an item that was not chosen in the window


class RecentCounts:
    """Counts before any time, of events in any order."""

    def __init__(self, options: RecentCountsOptions, events: Steps) -> None:
        self.options = options
        self._window, self._popular_window = duration(options.window), duration(options.popularity_window)
        kept = events.item >= FIRST_ITEM
        order = np.argsort(events.time[kept], kind="stable")
        item_E, self._time_E = events.item[kept][order], events.time[kept][order]
        previous_E = events.previous[kept][order]
        self._item_E = item_E
        self._size = int(max(item_E.max(initial=0), previous_E.max(initial=0))) + 1  # ids of items that occur
        # Events of the same time share the place of the first of them: a count before that time has none of them.
        place_E = np.searchsorted(self._time_E, self._time_E)
        self._of_item = _Occurrences(item_E, place_E)
        followed = (previous_E >= FIRST_ITEM) & (previous_E != item_E)
        previous_E, item_E, place_E = previous_E[followed], item_E[followed], place_E[followed]
        self._after = _Occurrences(previous_E, place_E)
        self._of_pair = _Occurrences(previous_E * self._size + item_E, place_E)
        self._follower_E = item_E[self._after.order]
        self._ticks: dict[int, np.ndarray] = {}

    @staticmethod
    def of(options: RecentCountsOptions, dataset: PreparedDataset, splits: tuple[str, ...]) -> RecentCounts:
        """Counts for queries of the last of `splits`. Raises NotApplicableError for a log without times."""
        return RecentCounts(options, RecentCounts.steps_of(options, dataset, splits))

    @staticmethod
    def steps_of(options: RecentCountsOptions, dataset: PreparedDataset, splits: tuple[str, ...]) -> Steps:
        """The events that queries of the last of `splits` can see. Raises NotApplicableError for a log without times."""
        record = dataset.record
        if not record.has_time:
            raise NotApplicableError("the log has no times: it needs data.columns.timestamp and data.timestamp_unit")
        by_time = f"{splits[-1]}_start" in record.split  # no query is earlier
        since = record.starts(splits[-1]) - RecentCounts.longest(options) if by_time else None
        return read_steps(dataset, splits, since)

    @staticmethod
    def longest(options: RecentCountsOptions) -> int:
        """Microseconds before a query that any count reaches back."""
        return max(duration(options.window), duration(options.popularity_window))

    def candidates(self, query: EvalQuery) -> tuple[np.ndarray, np.ndarray]:
        """(C,) rows and (C,) items: popular ones, and the latest choices after the user's last items; some twice."""
        time_B = query.time_B.numpy()
        tick = self._popular_window // _TICKS
        popular = [self._popular(int(at) * tick) for at in time_B // max(1, tick)]
        row_C = np.repeat(np.arange(len(time_B)), [len(one) for one in popular])
        rows, items = [row_C], [np.concatenate([*popular, np.zeros(0, np.int64)])]
        until_B, since_B = self._places(time_B), self._places(time_B - self._window)
        for last_B in self._last_items(query).T:
            until = self._after.before(last_B, until_B)
            number = np.minimum(until - self._after.before(last_B, since_B), _FOLLOWING)
            index, _ = range_index(until - number, number)
            rows.append(np.repeat(np.arange(len(time_B)), number))
            items.append(self._follower_E[index])
        return np.concatenate(rows), np.concatenate(items)

    def probabilities(self, query: EvalQuery, row_C: np.ndarray, item_C: np.ndarray) -> np.ndarray:
        """(C,) P of each item for the query of its row."""
        time_B = query.time_B.numpy()
        until_B, since_B = self._places(time_B), self._places(time_B - self._popular_window)
        count_C = self._of_item.before(item_C, until_B[row_C]) - self._of_item.before(item_C, since_B[row_C])
        share_C = (count_C + _LEAST) / (until_B - since_B + 1)[row_C]
        since_B, smoothing = self._places(time_B - self._window), self.options.smoothing
        last_BL = self._last_items(query)
        weight_L = 0.5 ** np.arange(last_BL.shape[1])
        found_C = np.zeros(len(row_C))
        for last_B, weight in zip(last_BL.T, weight_L / weight_L.sum(), strict=True):
            total_B = self._after.before(last_B, until_B) - self._after.before(last_B, since_B)
            pair_C = last_B[row_C] * self._size + item_C
            pair_C[item_C >= self._size] = -1
            count_C = self._of_pair.before(pair_C, until_B[row_C]) - self._of_pair.before(pair_C, since_B[row_C])
            found_C += weight * (count_C + smoothing * share_C) / (total_B[row_C] + smoothing)
        return found_C

    def recommend(self, query: EvalQuery, k: int, exclude_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        """Lists by P alone: the baseline `transitions`."""
        row_C, item_C = distinct(*self.candidates(query), query, exclude_seen)
        return lists_of(row_C, item_C, self.probabilities(query, row_C, item_C), query.batch.num_rows, k)

    def _places(self, time_B: np.ndarray) -> np.ndarray:
        """How many events are before each time."""
        return np.asarray(np.searchsorted(self._time_E, time_B))

    def _popular(self, time: int) -> np.ndarray:
        if time not in self._ticks:
            until, since = self._places(np.array([time, time - self._popular_window]))
            items, counts = np.unique(self._item_E[since:until], return_counts=True)
            self._ticks[time] = items[np.argsort(-counts, kind="stable")[:_POPULAR]]
        return self._ticks[time]

    def _last_items(self, query: EvalQuery) -> np.ndarray:
        """(B, L) the user's last items, the last one first; -1 where there are fewer, or the item is not known."""
        offsets, values = query.seen.offsets.numpy(), query.seen.values.numpy()
        back = np.arange(1, self.options.last_items + 1)
        at_BL = offsets[1:, None] - back
        there = at_BL >= offsets[:-1, None]
        items = values[np.where(there, at_BL, 0)] if len(values) else np.zeros(there.shape, np.int64)
        return np.where(there & (items >= FIRST_ITEM) & (items < self._size), items, -1)


class _Occurrences:
    """Places at which keys occur, in the order of (key, place)."""

    def __init__(self, key_E: np.ndarray, place_E: np.ndarray) -> None:
        self._keys, number_E = np.unique(key_E, return_inverse=True)
        self._places = int(place_E.max(initial=0)) + 2  # one more than the largest that is asked for
        self.order = np.lexsort((place_E, number_E))
        self._sorted = (number_E * self._places + place_E)[self.order]

    def before(self, key: np.ndarray, place: np.ndarray) -> np.ndarray:
        """How many occurrences sort before (key, place). For one key the difference of two places is a count between them;
        both are 0 for a key that does not occur."""
        if not len(self._keys):
            return np.zeros(len(key), np.int64)
        number = np.minimum(np.searchsorted(self._keys, key), len(self._keys) - 1)
        found = np.searchsorted(self._sorted, number * self._places + np.minimum(place, self._places - 1))
        return np.where(self._keys[number] == key, found, 0)


def distinct(
    row_C: np.ndarray, item_C: np.ndarray, query: EvalQuery, exclude_seen: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Each (row, item) once, in order, without reserved ids, and with `exclude_seen` without items of the user."""
    kept = item_C >= FIRST_ITEM
    row_C, item_C = row_C[kept], item_C[kept]
    base = int(max(item_C.max(initial=0), query.seen.values.max() if len(query.seen.values) else 0)) + 1
    key_C = np.unique(row_C * base + item_C)
    if exclude_seen:
        seen = query.seen.row_index().numpy() * base + query.seen.values.numpy()
        key_C = key_C[~np.isin(key_C, seen)]
    return key_C // base, key_C % base


def lists_of(
    row_C: np.ndarray, item_C: np.ndarray, score_C: np.ndarray, rows: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """(B, k) items and scores of pairs in any order: the best first, ties by lower id, then PAD and -inf."""
    order = np.lexsort((item_C, -score_C, row_C))
    row_C = row_C[order]
    place_C = np.arange(len(row_C)) - np.searchsorted(row_C, row_C)
    kept = place_C < k
    ids_BK, scores_BK = np.full((rows, k), PAD, np.int64), np.full((rows, k), -np.inf, np.float32)
    ids_BK[row_C[kept], place_C[kept]] = item_C[order][kept]
    scores_BK[row_C[kept], place_C[kept]] = score_C[order][kept]
    return ids_BK, scores_BK


def at_time(query: EvalQuery, time: int) -> EvalQuery:
    """The same queries, asked at another time."""
    return EvalQuery(query.batch, query.seen, query.targets, torch.full_like(query.time_B, time))
