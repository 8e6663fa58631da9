"""Drawing negatives for a log that only has positives: items that a user did not choose. numpy, one bucket at a time.

A negative gets the user, time, split and context of its positive. An item that the user chose in this split or an
earlier one is never drawn. An item that the user chooses in a later split may be drawn: leaving it out would leak the
future.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from recray.config import NegativesConfig
from recray.data.hashing import mix
from recray.ids import FIRST_ITEM

_ROUNDS = 100  # of drawing again where an item was drawn that the user chose
MAX_SAMPLE = 1_048_576  # events that represent the whole log for draw = 'recent'


@dataclass(frozen=True)
class Sampler:
    """How items are drawn.

    counts_N: train events of item ids FIRST_ITEM, FIRST_ITEM + 1, ... time_S, item_S: a sample of the log's events by time, `share` of them.
    """

    config: NegativesConfig
    counts_N: np.ndarray
    time_S: np.ndarray | None = None
    item_S: np.ndarray | None = None
    share: float = 1.0

    @cached_property
    def _cumulative_N(self) -> np.ndarray:
        return np.cumsum(self.counts_N)

    def items(self, rng: np.random.Generator, time_M: np.ndarray) -> np.ndarray:
        """(M,) ids for negatives at these times."""
        if self.config.draw == "uniform":
            return rng.integers(FIRST_ITEM, FIRST_ITEM + len(self.counts_N), len(time_M))
        total = self._cumulative_N
        popular = np.searchsorted(total, rng.integers(0, total[-1], len(time_M)), side="right") + FIRST_ITEM
        if self.config.draw == "popularity" or self.time_S is None or self.item_S is None:
            return popular
        window = max(1, round(self.config.recent_events * self.share))
        end = np.searchsorted(self.time_S, time_M, side="left")
        at = end - 1 - (rng.random(len(time_M)) * np.minimum(window, end)).astype(np.int64)
        return np.where(end > 0, self.item_S[np.maximum(at, 0)], popular)


def draw(
    sampler: Sampler,
    user_E: np.ndarray,
    code_E: np.ndarray,
    item_E: np.ndarray,
    time_E: np.ndarray,
    wanted_E: np.ndarray,
    seed: list[int],
) -> tuple[np.ndarray, np.ndarray]:
    """Draw negatives for the events marked in `wanted_E`, all of which are positive.

    Returns the index of each negative's positive, and its item id. Fewer are returned for users who chose nearly all items.
    """
    rng = np.random.default_rng(seed)
    span = len(sampler.counts_N) + FIRST_ITEM
    key_E = user_E * span + item_E
    order = np.lexsort((code_E, key_E))
    chosen, first = np.unique(key_E[order], return_index=True)
    code_of_chosen = code_E[order][first]
    positive_M = np.repeat(np.flatnonzero(wanted_E), sampler.config.per_positive)
    item_M = np.zeros(len(positive_M), np.int64)
    open_M = np.arange(len(positive_M))
    for _ in range(_ROUNDS):
        if not len(open_M):
            break
        event = positive_M[open_M]
        item_M[open_M] = sampler.items(rng, time_E[event])
        key = user_E[event] * span + item_M[open_M]
        at = np.minimum(np.searchsorted(chosen, key), len(chosen) - 1)
        open_M = open_M[(chosen[at] == key) & (code_of_chosen[at] <= code_E[event])]
    found = np.ones(len(positive_M), bool)
    found[open_M] = False
    return positive_M[found], item_M[found]


def sampled(order_E: np.ndarray, share: float) -> np.ndarray:
    """(E,) bool: a random sample that depends only on the unique `order` of events."""
    if not share:
        return np.zeros(len(order_E), bool)
    return np.asarray(mix(order_E.astype(np.int64).view(np.uint64)).astype(np.float64) / 2.0**64 < share)
