"""A baseline of your own: the items that most often followed the user's last item in the train split.

The other items of a list are the most popular ones.
"""

from __future__ import annotations

import itertools

import numpy as np

from recray.config import BaselineOptions
from recray.data.dataset import PreparedDataset
from recray.ids import FIRST_ITEM, PAD
from recray.loading.collate import EvalQuery


class Options(BaselineOptions):
    pass


class Followers:
    def __init__(self, dataset: PreparedDataset) -> None:
        self._popular_N = dataset.item_counts() / (dataset.item_counts().sum() + 1)  # below 1: it breaks ties
        self._followed: dict[int, np.ndarray] = {}
        for table in dataset.iter_tables("train"):
            for items in table["item"].to_pylist():
                for item, following in itertools.pairwise(items):
                    self._followed.setdefault(item, np.zeros(len(self._popular_N)))[following] += 1

    def recommend(self, query: EvalQuery, k: int, exclude_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        """Ids (B, k), best first, and scores (B, k); PAD and -inf where no item is left."""
        ids, scores = np.full((query.batch.num_rows, k), PAD), np.full((query.batch.num_rows, k), -np.inf, np.float32)
        offsets, values = query.seen.offsets.numpy(), query.seen.values.numpy()
        for row in range(len(ids)):
            seen = values[offsets[row] : offsets[row + 1]]
            score_N = self._popular_N.copy()
            if len(seen):
                score_N += self._followed.get(int(seen[-1]), 0.0)
            score_N[:FIRST_ITEM] = -np.inf  # padding and the unknown item
            if exclude_seen:
                score_N[seen] = -np.inf
            best = np.argsort(-score_N, kind="stable")[:k]
            ids[row, : len(best)] = np.where(np.isfinite(score_N[best]), best, PAD)
            scores[row, : len(best)] = score_N[best]
        return ids, scores


def build(options: Options, dataset: PreparedDataset, split: str) -> Followers:
    return Followers(dataset)
