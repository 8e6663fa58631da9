"""A prepared dataset on disk (layout in recray.data.prepare)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from recray import storage
from recray.artifacts import Run
from recray.records import DatasetRecord


@dataclass(frozen=True)
class PreparedDataset:
    uri: str
    record: DatasetRecord

    @staticmethod
    def open(uri: str) -> PreparedDataset:
        """Raises LineageError if prepare never completed there."""
        return PreparedDataset(uri, DatasetRecord.read(uri))

    @staticmethod
    def of(run: Run) -> PreparedDataset:
        """The prepared dataset of a run. Raises LineageError if there is none for its configuration."""
        artifact = run.dataset()
        return PreparedDataset(artifact.uri, artifact.record)

    def file_uri(self, file: str) -> str:
        """The location of a shard's `file`."""
        return storage.join(self.uri, file)

    def iter_tables(self, split: str) -> Iterator[pa.Table]:
        """One table of user rows per shard."""
        for shard in self.record.shards.get(split, []):
            yield storage.read_table(self.file_uri(shard.file))

    def iter_early(self, split: str) -> Iterator[pa.Table]:
        """Events of a split that are no targets, since their users have too few events before them (data.min_history):
        one table for each file, of user rows that hold nothing else."""
        for file in self.record.early.get(split, []):
            yield storage.read_table(self.file_uri(file))

    def items(self) -> pa.Table:
        """Columns item (the original key), count and encoded features; row i is item id i."""
        return storage.read_table(storage.join(self.uri, "items.parquet"))

    def item_counts(self) -> np.ndarray:
        """(N,) int64 training events of each item id; 0 for PAD and UNKNOWN."""
        return np.asarray(self.items()["count"].to_numpy())

    def user_keys(self) -> pa.Table:
        """Columns user_id and user (the original key), one row per user."""
        files = storage.list_files(storage.join(self.uri, "users"))
        return pa.concat_tables([storage.read_table(info.uri) for info in files])
