"""A recommender that is timed."""

from __future__ import annotations

import time

import numpy as np

from recray.loading.collate import EvalQuery
from recray.retrieval import Recommender


class Measured:
    """A recommender that keeps its last answer and its time: what a ranker was given, and what it waited for."""

    def __init__(self, recommender: Recommender) -> None:
        self._recommender = recommender
        self.ids = np.zeros((0, 0), np.int64)
        self.seconds = 0.0

    def recommend(self, query: EvalQuery, k: int, exclude_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        started = time.perf_counter()
        self.ids, scores = self._recommender.recommend(query, k, exclude_seen)
        self.seconds = time.perf_counter() - started
        return self.ids, scores
