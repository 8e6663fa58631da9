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

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    sampled: int | None = None  # examples in an epoch, if they are sampled

    @staticmethod
    def of(*shards: Shard) -> ShardGroup:
        return ShardGroup(
            tuple(s.file for s in shards),
            sum(s.rows for s in shards),
            sum(s.events for s in shards),
            sum(s.impressions for s in shards),
        )


def num_examples(shard: ShardGroup, examples: Examples) -> int:
    """Examples of a shard in an epoch."""
    if shard.sampled is not None:
        return shard.sampled
    if examples == "impressions":
        return shard.impressions
    return shard.rows if examples == "sequences" else shard.events


# What the workers have consumed of an epoch: (number of workers, examples that each of them took), one per start of the
# training. Two numbers are enough, since shares and orders are arithmetic: see `remaining`.
Segments = Sequence[tuple[int, int]]


def epoch_order(shards: list[ShardGroup], seed: int, epoch: int, examples: Examples) -> list[ShardSlice]:
    """All examples of an epoch, in the order in which a single worker trains on them."""
    order = np.random.default_rng([seed, epoch, 1]).permutation(len(shards))
    sizes = [(index, num_examples(shards[index], examples)) for index in order.tolist()]
    return [ShardSlice(epoch, index, 0, size) for index, size in sizes if size]


def share(slices: list[ShardSlice], rank: int, world_size: int) -> list[ShardSlice]:
    """The part of worker `rank`: the rank-th of `world_size` contiguous parts, whose sizes differ by at most one."""
    total = num_rows(slices)
    begin, end = rank * total // world_size, (rank + 1) * total // world_size
    found, at = [], 0
    for one in slices:
        start, stop = max(one.start, one.start + begin - at), min(one.stop, one.start + end - at)
        if start < stop:
            found.append(replace(one, start=start, stop=stop))
        at += one.stop - one.start
    return found


def remaining(slices: list[ShardSlice], segments: Segments) -> list[ShardSlice]:
    """What is left of `slices` after training that was interrupted, possibly several times and with other numbers of workers.

    Each of W workers takes its share from the start. After n examples the rest of all W shares, one behind the other, is
    what the next start shares out. With the same W every worker continues exactly where it stopped: (r T) // W - r n =
    (r (T - W n)) // W.
    """
    for workers, taken in segments:
        slices = [one for rank in range(workers) for one in _skip(share(slices, rank, workers), taken)]
    return slices


def _skip(slices: list[ShardSlice], count: int) -> list[ShardSlice]:
    """Without the first `count` examples."""
    found = []
    for one in slices:
        skipped = min(count, one.stop - one.start)
        count -= skipped
        if one.start + skipped < one.stop:
            found.append(replace(one, start=one.start + skipped))
    return found


def num_rows(slices: list[ShardSlice]) -> int:
    return sum(one.stop - one.start for one in slices)


def num_batches(rows: int, world_size: int, batch_size: int) -> int:
    """Batches of the worker with the most of `rows` examples. The others end the epoch with batches of weight 0."""
    largest = -(-rows // world_size)
    return -(-largest // batch_size)
