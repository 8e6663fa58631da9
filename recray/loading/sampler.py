"""The plan of an epoch: which worker trains on which examples. Arithmetic only.

From (seed, epoch, rank, world size) every worker knows which examples are its own,
equal to within one over the workers, so nobody waits for anybody at the end and nothing
is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recray.models import Examples
from recray.records import Shard


@dataclass(frozen=True)
class ShardSlice:
    """Examples start:stop of a shard in the order of its epoch's permutation."""

    epoch: int
    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class ShardGroup:
    """Files whose rows are read and shuffled as one table."""

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
    """This worker's part of an epoch: a contiguous share of the shuffled shards."""
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
    """Batches of the worker with most examples; the others pad with a batch of weight 0."""
    total = sum(num_examples(shard, examples) for shard in shards)
    largest = -(-total // world_size)
    return -(-largest // batch_size)
