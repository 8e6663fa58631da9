"""Baselines that count: what any model must beat. They rank as recray.retrieval.recommenders do. The linear one is in item_filter.

Shape legend: B queries, N items, K places.
"""

from __future__ import annotations

import numpy as np

from recray.data.dataset import PreparedDataset
from recray.data.split import before
from recray.ids import FIRST_ITEM
from recray.loading.batch import Jagged
from recray.loading.collate import EvalQuery
from recray.retrieval.item_knn import new_events


class Popularity:
    """One order of the items for everybody."""

    def __init__(self, counts_N: np.ndarray) -> None:
        """counts_N: how often each item id was chosen; ties stand in order of id."""
        self._order = FIRST_ITEM + np.argsort(-counts_N[FIRST_ITEM:], kind="stable")

    def __call__(self, question: EvalQuery, k: int, filter_seen: bool) -> np.ndarray:
        seen = question.seen if filter_seen else Jagged(question.seen.values[:0], question.seen.offsets * 0)
        wanted = min(len(self._order), k + int(seen.lengths().max()))
        row_E = np.repeat(np.arange(question.batch.num_rows), seen.lengths().numpy())
        head = self._order[:wanted]
        # Places of seen items in the head of the order are struck out.
        place_of = np.full(len(self._order) + FIRST_ITEM, wanted)
        place_of[head] = np.arange(wanted)
        place_E = place_of[seen.values.numpy()]
        kept = np.ones((question.batch.num_rows, wanted + 1), bool)
        kept[row_E, place_E] = False
        kept = kept[:, :wanted]
        first = np.argsort(~kept, axis=1, kind="stable")[:, :k]
        ids = np.where(np.take_along_axis(kept, first, 1), head[first], 0)
        return np.pad(ids, ((0, 0), (0, k - ids.shape[1])))


def recent_popularity(dataset: PreparedDataset, split: str, window_us: int) -> Popularity:
    """By counts in the window before the split; then by train count."""
    until = dataset.record.starts(split)
    recent_N = sum(_chosen(dataset, name, until - window_us, until) for name in before(split))
    counts_N = dataset.item_counts()
    return Popularity(recent_N + counts_N / (counts_N.sum() + 1))


def hindsight(dataset: PreparedDataset, split: str) -> Popularity:
    """By counts in the split itself, which nobody knows before: about the most that one list for everybody can hit."""
    return Popularity(_chosen(dataset, split))


def _chosen(dataset: PreparedDataset, split: str, begin: int | None = None, end: int | None = None) -> np.ndarray:
    """(N,) how often each item was chosen in a split, at begin <= time < end."""
    chosen_N = np.zeros(dataset.record.num_items)
    for table in dataset.iter_tables(split):
        # Rows of later splits begin with earlier events: only targets are new.
        kept = new_events(table)
        if begin is not None:
            times = table["time"].combine_chunks().flatten().to_numpy()
            kept &= (times >= begin) & (times < end)
        chosen_N += np.bincount(table["item"].combine_chunks().flatten().to_numpy()[kept], minlength=len(chosen_N))
    return chosen_N
