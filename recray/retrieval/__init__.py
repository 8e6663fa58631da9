"""Items for queries: exact search, a faiss index, re-ranking and baselines, each one a `Recommender`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

    from recray.loading.collate import EvalQuery


class Recommender(Protocol):
    """Answers queries with ranked lists of items."""

    def recommend(self, query: EvalQuery, k: int, exclude_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        """The best k items of each of the B queries in `query`.

        Returns ids (B, k) int64, best first, and scores (B, k) float32, which are comparable within a row only.
        With `exclude_seen`, items in query.seen are left out. Rows with fewer than k items left end in PAD and -inf.
        """
        ...
