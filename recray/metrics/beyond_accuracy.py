"""What recommendation lists are like beyond hits. numpy only; parts of several workers add up.

coverage@K      share of the catalogue that is recommended to anybody
gini@K          inequality of how often items are recommended, zeros included
arp@K           mean train count of recommended items (popularity bias)
novelty@K       mean -log2(count / users) of recommended items (mean inverse user frequency)
ild@K           mean pairwise 1 - cosine of the item vectors inside a list
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recray.ids import FIRST_ITEM


@dataclass
class ListCounts:
    """Mergeable sums over users."""

    shown_N: np.ndarray  # times each item id was recommended
    distance: float = 0.0  # sum over users of the mean pairwise distance
    users: int = 0

    def add(self, ranked_BK: np.ndarray, vectors_ND: np.ndarray) -> None:
        """Count lists; ids below FIRST_ITEM fill places that are empty. vectors_ND: item vectors by id."""
        filled_BK = ranked_BK >= FIRST_ITEM
        self.shown_N += np.bincount(ranked_BK[filled_BK], minlength=len(self.shown_N))
        unit = vectors_ND[ranked_BK].astype(np.float64)
        unit /= np.maximum(np.linalg.norm(unit, axis=2, keepdims=True), 1e-12)
        unit *= filled_BK[..., None]
        n = filled_BK.sum(axis=1)
        same = (unit.sum(axis=1) ** 2).sum(axis=1) - n  # sum of cosines over ordered pairs
        pairs = n * (n - 1)
        self.distance += float((1 - same[pairs > 0] / pairs[pairs > 0]).sum())
        self.users += len(ranked_BK)

    def __add__(self, other: ListCounts) -> ListCounts:
        return ListCounts(self.shown_N + other.shown_N, self.distance + other.distance, self.users + other.users)

    def metrics(self, k: int, train_counts_N: np.ndarray, num_users: int) -> dict[str, float]:
        shown = self.shown_N[FIRST_ITEM:].astype(np.float64)
        total = max(shown.sum(), 1.0)
        ordered = np.sort(shown)
        n = len(ordered)
        gini = float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * total)) if n else 0.0
        counts = train_counts_N[FIRST_ITEM:].astype(np.float64)
        novelty = -np.log2(np.maximum(counts, 1) / max(num_users, 1))
        return {
            f"coverage@{k}": float((shown > 0).mean()) if n else 0.0,
            f"gini@{k}": gini,
            f"arp@{k}": float(shown @ counts / total),
            f"novelty@{k}": float(shown @ novelty / total),
            f"ild@{k}": self.distance / max(self.users, 1),
        }
