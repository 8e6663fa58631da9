"""By the number of events that the model was trained on: those of train, and after a refit those of validation, too.

Shape legend: B queries, N items, K places.
"""

from __future__ import annotations

import numpy as np

from recray.config.baselines import BaselineOptions as Options
from recray.data.dataset import PreparedDataset
from recray.ids import FIRST_ITEM, PAD
from recray.loading.collate import EvalQuery
from recray.loading.jagged import Jagged


class Popularity:
    """The same order of items for all users; scores are the counts."""

    def __init__(self, counts_N: np.ndarray) -> None:
        """counts_N: how often each item id was chosen. Equal counts are in order of id."""
        self.order = FIRST_ITEM + np.argsort(-counts_N[FIRST_ITEM:], kind="stable")
        self._counts_N = counts_N

    def recommend(self, query: EvalQuery, k: int, exclude_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        seen = query.seen if exclude_seen else Jagged(query.seen.values[:0], query.seen.offsets * 0)
        # The head of the order is long enough for k items after all seen ones are removed.
        wanted = min(len(self.order), k + int(seen.lengths().max()))
        head = self.order[:wanted]
        place_of = np.full(len(self.order) + FIRST_ITEM, wanted)  # items behind the head share one extra place
        place_of[head] = np.arange(wanted)
        kept = np.ones((query.batch.num_rows, wanted + 1), bool)
        kept[seen.row_index().numpy(), place_of[seen.values.numpy()]] = False
        kept = kept[:, :wanted]
        first = np.argsort(~kept, axis=1, kind="stable")[:, :k]
        filled, ids = np.take_along_axis(kept, first, 1), head[first]
        short = ((0, 0), (0, k - ids.shape[1]))
        scores = np.where(filled, self._counts_N[ids], -np.inf).astype(np.float32)
        return (
            np.pad(np.where(filled, ids, PAD), short, constant_values=PAD),
            np.pad(scores, short, constant_values=-np.inf),
        )


def build(options: Options, dataset: PreparedDataset, split: str) -> Popularity:
    return Popularity(dataset.item_counts())
