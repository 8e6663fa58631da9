"""A baseline of your own: the items that most often followed the user's last item in the train split.

The other items of a list are the most popular ones.
"""

from __future__ import annotations

import itertools

import numpy as np

from recray.config import BaselineOptions
from recray.data.dataset import PreparedDataset
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

    def __call__(self, question: EvalQuery, k: int, filter_seen: bool) -> np.ndarray:
        """(B, k) item ids, best first; 0 where nothing is left."""
        lists = np.zeros((question.batch.num_rows, k), np.int64)
        offsets, values = question.seen.offsets.numpy(), question.seen.values.numpy()
        for row in range(len(lists)):
            seen = values[offsets[row] : offsets[row + 1]]
            score_N = self._popular_N.copy()
            if len(seen):
                score_N += self._followed.get(int(seen[-1]), 0.0)
            score_N[:2] = -1  # padding and the unknown item
            if filter_seen:
                score_N[seen] = -1
            best = np.argsort(-score_N, kind="stable")[:k]
            lists[row, : len(best)] = np.where(score_N[best] >= 0, best, 0)
        return lists


def build(options: Options, dataset: PreparedDataset, split: str) -> Followers:
    return Followers(dataset)
