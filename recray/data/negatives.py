"""Drawing negatives for a log that only has positives: items that a user did not choose. numpy, one bucket at a time.

A negative gets the user, time, split and context of its positive. Whether the user had chosen an item before must not tell
a negative from a positive:

    the positive is                                  its negatives are
    an item that the user had not chosen before      never chosen by the user in this split or an earlier one
    a repeat                                         other items that the user had chosen before, as often as chosen

An item that the user chooses in a later split may be drawn: leaving it out would leak the future.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from recray.config import NegativesConfig
from recray.data.hashing import mix
from recray.ids import FIRST_ITEM, UNKNOWN

_ROUNDS = 100  # of drawing again where an item was drawn that the user chose
MAX_SAMPLE = 1_048_576  # events that represent the whole log for draw = 'recent' and 'targets'


@dataclass(frozen=True)
class Sample:
    """Which events of the log the sampler gets: a share of those with `min_history` earlier ones, by split or by time.

    Positives have so many earlier ones, too: users with long histories choose other items than the rest do.
    """

    share: float = 0.0
    by_split: bool = False
    min_history: int = 0


@dataclass(frozen=True)
class Sampler:
    """How items are drawn.

    counts_N: train events of item ids FIRST_ITEM, FIRST_ITEM + 1, ...
    place_S, item_S: a sample of the log's events, `share` of them, sorted by place. A place is a time with draw =
    "recent", and a split (0 train, 1 valid, 2 test) with draw = "targets".
    """

    config: NegativesConfig
    counts_N: np.ndarray
    place_S: np.ndarray | None = None
    item_S: np.ndarray | None = None
    share: float = 1.0

    @cached_property
    def _cumulative_N(self) -> np.ndarray:
        return np.cumsum(self.counts_N)

    def items(self, rng: np.random.Generator, time_M: np.ndarray, code_M: np.ndarray) -> np.ndarray:
        """(M,) ids for negatives of positives at these times in these splits."""
        if self.config.draw == "uniform":
            return rng.integers(FIRST_ITEM, FIRST_ITEM + len(self.counts_N), len(time_M))
        total = self._cumulative_N
        popular = np.searchsorted(total, rng.integers(0, total[-1], len(time_M)), side="right") + FIRST_ITEM
        if self.config.draw == "popularity" or self.place_S is None or self.item_S is None:
            return popular
        if self.config.draw == "targets":
            begin, end = (np.searchsorted(self.place_S, code_M, side=side) for side in ("left", "right"))
        else:
            end = np.searchsorted(self.place_S, time_M, side="left")
            begin = np.maximum(end - max(1, round(self.config.recent_events * self.share)), 0)
        at = end - 1 - (rng.random(len(time_M)) * (end - begin)).astype(np.int64)
        return np.where(end > begin, self.item_S[np.maximum(at, 0)], popular)


def draw(
    sampler: Sampler,
    user_E: np.ndarray,
    code_E: np.ndarray,
    item_E: np.ndarray,
    time_E: np.ndarray,
    wanted_E: np.ndarray,
    seed: list[int],
) -> tuple[np.ndarray, np.ndarray]:
    """Draw negatives for the events marked in `wanted_E`, all of which are positive and in order of (user, split, time).

    Returns the index of each negative's positive, and its item id. Fewer are returned for users who chose nearly all
    items, or who repeat the only item that they ever chose.
    """
    rng = np.random.default_rng(seed)
    counts = np.concatenate([np.zeros(FIRST_ITEM), sampler.counts_N, [0]])  # by item id; the last one is of larger ids
    span = 1 + max(
        len(counts), int(item_E.max(initial=0)), *([] if sampler.item_S is None else [int(sampler.item_S.max())])
    )
    key_E = user_E * span + item_E
    order = np.lexsort((code_E, key_E))
    chosen, first = np.unique(key_E[order], return_index=True)
    code_of_chosen = code_E[order][first]
    begin_E, end_E = _histories(user_E, time_E)
    _, first_E, inverse_E = np.unique(key_E, return_index=True, return_inverse=True)
    repeats_E = (first_E[inverse_E] < end_E) & (item_E != UNKNOWN)
    positive_M = np.repeat(np.flatnonzero(wanted_E), sampler.config.per_positive)
    item_M = np.zeros(len(positive_M), np.int64)

    def unseen(event: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        item = sampler.items(rng, time_E[event], code_E[event])
        key = user_E[event] * span + item
        at = np.minimum(np.searchsorted(chosen, key), len(chosen) - 1)
        seen = (chosen[at] == key) & (code_of_chosen[at] <= code_E[event])
        # Unknown items are many items. Train events have none of them.
        trained = counts[np.minimum(item, len(counts) - 1)] > 0
        return item, (~seen | (item == UNKNOWN)) & (trained | (code_E[event] > 0))

    def earlier(event: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = begin_E[event] + (rng.random(len(event)) * (end_E[event] - begin_E[event])).astype(np.int64)
        return item_E[at], (item_E[at] != item_E[event]) & (item_E[at] != UNKNOWN)

    found = np.zeros(len(positive_M), bool)
    for propose, open_M in (
        (unseen, np.flatnonzero(~repeats_E[positive_M])),
        (earlier, np.flatnonzero(repeats_E[positive_M])),
    ):
        for _ in range(_ROUNDS):
            if not len(open_M):
                break
            item_M[open_M], right = propose(positive_M[open_M])
            found[open_M[right]] = True
            open_M = open_M[~right]
    return positive_M[found], item_M[found]


def _histories(user_E: np.ndarray, time_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(E,) begin and end of each event's history: the events of its user before it, without those of the same time."""
    new_user = np.diff(user_E, prepend=-1) != 0
    new_time = new_user | (np.diff(time_E, prepend=0) != 0)
    at = np.arange(len(user_E))
    return np.maximum.accumulate(np.where(new_user, at, 0)), np.maximum.accumulate(np.where(new_time, at, 0))


def sampled(order_E: np.ndarray, share: float) -> np.ndarray:
    """(E,) bool: a random sample that depends only on the unique `order` of events."""
    if not share:
        return np.zeros(len(order_E), bool)
    return np.asarray(mix(order_E.astype(np.int64).view(np.uint64)).astype(np.float64) / 2.0**64 < share)
