"""The batches of one worker: which rows, cut into how many batches, and read ahead.

An optimizer step takes `accumulation_steps` batches on every worker. All workers take equally many steps: one that runs
out of rows gets padding batches, which weigh nothing. For example, with 1,000 rows, 2 workers, a global batch of 300 and
2 accumulation steps a batch has 300 / (2 * 2) = 75 rows. A worker's 500 rows make 6 batches of 75 and one of 50,
padded to 8 batches: 4 steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import pyarrow as pa
import torch

from recray import log
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.data.split import duration
from recray.errors import ConfigError
from recray.loading.batch import Batch
from recray.loading.collate import iter_batches, padding_like
from recray.loading.examples import Decay, example_table
from recray.loading.prefetch import DeviceLoader
from recray.loading.sampler import (
    Segments,
    ShardGroup,
    ShardSlice,
    epoch_order,
    num_batches,
    num_examples,
    num_rows,
    remaining,
    share,
)
from recray.models import Examples
from recray.training.distributed import Context, read_shards
from recray.training.phase import Phase
from recray.training.warm_start import WarmStart


@dataclass(frozen=True)
class TrainingData:
    config: Config
    dataset: PreparedDataset
    phase: Phase
    examples: Examples  # how the model wants rows cut into training examples
    context: Context
    start: WarmStart | None = None

    @cached_property
    def shards(self) -> list[ShardGroup]:
        """The shards of the phase. Raises ConfigError if training.half_life cannot be applied."""
        shards, decay = self.phase.shards(self.dataset), self._decay()
        return shards if decay is None else self._sampled(shards, decay)

    @property
    def rows(self) -> int:
        """Training examples of an epoch, over all workers."""
        return sum(num_examples(shard, self.examples) for shard in self.shards)

    @property
    def batch_size(self) -> int:
        """Rows of one batch on one worker."""
        parts = self.context.world_size * self.config.training.accumulation_steps
        return self.config.training.global_batch_size // parts

    @property
    def steps(self) -> int:
        """Optimizer steps of a whole epoch."""
        return self._steps(self.rows)

    @property
    def rows_per_step(self) -> int:
        """Training examples that a worker takes in one step, unless it runs out of them."""
        return self.batch_size * self.config.training.accumulation_steps

    def rest(self, epoch: int, segments: Segments = ()) -> list[ShardSlice]:
        """What all workers together still have to train on in an epoch (from 0), of which `segments` are done."""
        return remaining(epoch_order(self.shards, self.config.run.seed, epoch, self.examples), segments)

    def loader(self, epochs: range, segments: Segments = ()) -> DeviceLoader:
        """Batches of these epochs, one epoch after the other without a pause: (batch, False if it is padding).

        segments: what is done of the first epoch.
        """
        plans, batches = [], []
        for epoch in epochs:
            rest = self.rest(epoch, segments if epoch == epochs.start else ())
            plans.append(share(rest, self.context.rank, self.context.world_size))
            batches.append(self._steps(num_rows(rest)) * self.config.training.accumulation_steps)
        tables = self.context.tables(self.dataset, self.shards, [part for plan in plans for part in plan])
        return DeviceLoader(tables, partial(self._padded, plans, batches, self._decay()), self.context.device)

    def _steps(self, rows: int) -> int:
        batches = num_batches(rows, self.context.world_size, self.batch_size)
        return -(-batches // self.config.training.accumulation_steps)

    def steps_left(self, epoch: int, segments: Segments) -> int:
        """Optimizer steps until the end of an epoch, of which `segments` are done."""
        return self._steps(num_rows(self.rest(epoch, segments)))

    def _padded(
        self,
        plans: list[list[ShardSlice]],
        wanted: list[int],
        decay: Decay | None,
        tables: Iterator[tuple[ShardSlice, pa.Table]],
    ) -> Iterator[tuple[Batch, bool]]:
        """Tables to equally many batches an epoch on every worker."""
        batch: Batch | None = None
        for plan, batches in zip(plans, wanted, strict=True):
            count = 0
            for batch in self._cut((next(tables) for _ in plan), decay):
                yield batch, True
                count += 1
            for _ in range(count, batches):
                if batch is None:  # this worker has no rows at all: any row shows what padding must look like
                    row = self.dataset.read(self.shards[0].files[0]).slice(0, 1)
                    batch = next(self._cut([(ShardSlice(0, 0, 0, 1), row)], None))
                yield padding_like(batch), False

    def _cut(self, tables: Iterable[tuple[ShardSlice, pa.Table]], decay: Decay | None) -> Iterator[Batch]:
        length, seed = self.config.model.history_length, self.config.run.seed
        known = ((part, self.dataset.known(table)) for part, table in tables)
        return iter_batches(known, self.batch_size, self.examples, length, seed, decay)

    def _sampled(self, shards: list[ShardGroup], decay: Decay) -> list[ShardGroup]:
        """The shards with their numbers of examples in an epoch, which follow from the times of events: each worker reads
        every world_size-th shard once for it."""
        counts = torch.zeros(len(shards), dtype=torch.int64)
        mine = [ShardSlice(0, shard, 0, 0) for shard in range(self.context.rank, len(shards), self.context.world_size)]
        for part, table in read_shards(self.dataset, shards, mine):
            known, length = self.dataset.known(table), self.config.model.history_length
            counts[part.shard] = example_table(known, self.examples, length, decay).per_epoch
        sampled = [int(count) for count in self.context.sum(counts)]
        half_life = self.config.training.half_life
        if not sum(sampled):
            raise ConfigError(
                f"training.half_life = '{half_life}': all events with a weight are more than 20 half-lives before the end of "
                f"training: set a longer one"
                if half_life is not None
                else f"training.replay = {self.config.training.replay:g}: {self.dataset.uri} has no train event that the "
                f"checkpoint has not seen: set it above 0"
            )
        said = "" if half_life is None else f"half-life of {half_life}: "
        if self._seen_until is not None:
            said += f"replay of {self.config.training.replay:g}: "
        if self.context.rank == 0:
            log.info(
                "train",
                f"{said}an epoch samples {sum(sampled):,} of "
                f"{sum(num_examples(shard, self.examples) for shard in shards):,} examples by their age",
                event="sampled",
                values={"sampled": sum(sampled)},
            )
        return [replace(shard, sampled=count) for shard, count in zip(shards, sampled, strict=True)]

    def _decay(self) -> Decay | None:
        half_life, record = self.config.training.half_life, self.dataset.record
        if half_life is None and self._seen_until is None:
            return None
        if half_life is not None and not record.has_time:
            raise ConfigError(
                f"training.half_life = '{half_life}' needs timestamps, and {self.dataset.uri} has positions only: "
                f"remove the key, or prepare from a log with data.columns.timestamp"
            )
        until = record.starts("valid" if self.phase.name == "train" else "test")
        age = None if half_life is None else duration(half_life)
        return Decay(until, age, self._seen_until, self.config.training.replay)

    @property
    def _seen_until(self) -> int | None:
        return None if self.start is None else self.start.seen_until
