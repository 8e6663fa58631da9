"""The users whose queries are asked where there are more than `evaluation.max_queries` or `training.max_valid_queries`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recray.records import Shard


def drawn_rows(shards: Sequence[Shard], most: int | None, kind: str, seed: int) -> list[np.ndarray] | None:
    """Rows of each shard, in order; None if all queries are asked. They depend on the dataset and the seed alone.

    Whole users are drawn, and intervals resample users. kind: `evaluation.queries`; with one query per event as many users
    are drawn as have `most` of them in the mean.
    """
    users = sum(shard.rows for shard in shards)
    queries = users if kind == "user" else sum(shard.impressions for shard in shards)
    if most is None or queries <= most:
        return None
    wanted = max(1, users * most // queries)
    chosen = np.sort(np.random.default_rng([seed, 5]).choice(users, wanted, replace=False, shuffle=False))
    offsets = np.cumsum([0, *(shard.rows for shard in shards)])
    parts = np.split(chosen, np.searchsorted(chosen, offsets[1:-1]))
    return [part - first for part, first in zip(parts, offsets[:-1], strict=True)]
