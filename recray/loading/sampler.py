"""Which worker trains on which examples of an epoch: arithmetic on (seed, epoch, worker, number of workers).

The shards are shuffled and laid end to end; worker r of W takes the r-th of W contiguous parts. Every example belongs to
one worker, shares differ by at most one example, and no worker has to ask another one. With two shards of 5 and 3
examples, an epoch that shuffles them to [shard 1, shard 0] gives

    worker 0 of 2    ShardSlice(shard=1, start=0, stop=3), ShardSlice(shard=0, start=0, stop=1)
    worker 1 of 2    ShardSlice(shard=0, start=1, stop=5)

start and stop count positions in the permutation of the shard's examples (recray.loading.collate.iter_batches), which is
the same on every worker.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recray.loading.examples import Examples
from recray.records import Shard


@dataclass(frozen=True)
class ShardSlice:
    """Examples start to stop of a shard, in the order of its permutation in that epoch."""

    epoch: int
    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class ShardGroup:
    """Files whose rows are read and shuffled as one shard."""

    files: tuple[str, ...]
    rows: int
    events: int
    impressions: int

    @staticmethod
    def of(*shards: Shard) -> ShardGroup:
        return ShardGroup(
            tuple(s.file for s in shards),
            sum(s.rows for s in shards),
            sum(s.events for s in shards),
            sum(s.impressions for s in shards),
        )


def num_examples(shard: ShardGroup, examples: Examples) -> int:
    if examples == "impressions":
        return shard.impressions
    return shard.rows if examples == "sequences" else shard.events


def epoch_plan(
    shards: list[ShardGroup], seed: int, epoch: int, rank: int, world_size: int, examples: Examples
) -> list[ShardSlice]:
    """The slices of worker `rank`, in the order in which it trains on them."""
    order = np.random.default_rng([seed, epoch, 1]).permutation(len(shards))
    total = sum(num_examples(shard, examples) for shard in shards)
    begin, end = rank * total // world_size, (rank + 1) * total // world_size
    slices, at = [], 0
    for index in order.tolist():
        size = num_examples(shards[index], examples)
        start, stop = max(begin - at, 0), min(end - at, size)
        if start < stop:
            slices.append(ShardSlice(epoch, index, start, stop))
        at += size
    return slices


def steps_per_epoch(shards: list[ShardGroup], world_size: int, batch_size: int, examples: Examples) -> int:
    """Batches of the worker with the most examples. The others end the epoch with batches of weight 0."""
    total = sum(num_examples(shard, examples) for shard in shards)
    largest = -(-total // world_size)
    return -(-largest // batch_size)
