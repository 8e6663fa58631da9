"""A prepared dataset on disk (layout in recray.data.prepare)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray import digests, storage
from recray.artifacts import Artifact, Run
from recray.digests import FileDigest
from recray.ids import SPLITS, UNKNOWN
from recray.records import CheckpointRecord, DatasetRecord

ITEMS = "items.parquet"


def read_verified(uri: str, digest: FileDigest | None) -> pa.Table:
    """A Parquet file whose bytes have this digest. Raises StorageError if they do not."""
    return storage.read_table(uri, data=None if digest is None else digest.read(uri))


@dataclass(frozen=True)
class PreparedDataset:
    """A prepared dataset as a model knows it: the items and values of features of the train split, or, for a refit, also
    those that the validation split adds. Everything else reads as UNKNOWN."""

    uri: str
    record: DatasetRecord  # with the sizes of what is known
    refit: bool = False

    @staticmethod
    def open(uri: str) -> PreparedDataset:
        """Raises LineageError if prepare never completed there."""
        return PreparedDataset(uri, DatasetRecord.read(uri))

    @staticmethod
    def of(run: Run) -> PreparedDataset:
        """The prepared dataset of a run.

        Raises LineageError if there is none for its configuration, StorageError if a file of it is missing.
        """
        return PreparedDataset.at(run.dataset())

    @staticmethod
    def at(artifact: Artifact[DatasetRecord]) -> PreparedDataset:
        """A complete artefact. Raises StorageError if a file of it is missing."""
        digests.check_present(artifact.uri, artifact.record.files)
        return PreparedDataset(artifact.uri, artifact.record)

    def refitted(self) -> PreparedDataset:
        """The dataset as a refit knows it."""
        return replace(self, record=self.record.refitted(), refit=True)

    def known_to(self, model: CheckpointRecord) -> PreparedDataset:
        """The dataset as a published model knows it."""
        return self.refitted() if model.config["training"]["refit"] else self

    def file_uri(self, file: str) -> str:
        """The location of a shard's `file`."""
        return storage.join(self.uri, file)

    def iter_tables(self, split: str) -> Iterator[pa.Table]:
        """One table of user rows per shard."""
        for shard in self.record.shards.get(split, []):
            yield self.read(shard.file)

    def read(self, file: str) -> pa.Table:
        """The user rows of one shard."""
        return self.known(self.read_file(file))

    def read_file(self, file: str) -> pa.Table:
        """A Parquet file as it is stored. Raises StorageError if it is not what prepare wrote."""
        return read_verified(self.file_uri(file), self.record.files.get(file))

    def latest(self, name: str, user_ids: pa.Array) -> Iterator[pa.Table]:
        """Rows of these users from the last split that has them, which contain all of their events.

        name: of the file that these users share: "part-00003.parquet".
        """
        left = user_ids
        existing = {split: {shard.file for shard in self.record.shards.get(split, [])} for split in SPLITS}
        for split in reversed(SPLITS):
            if f"{split}/{name}" not in existing[split]:
                continue
            table = self.read(f"{split}/{name}")
            table = table.filter(pc.is_in(table["user"], value_set=left))
            left = left.filter(pc.invert(pc.is_in(left, value_set=table["user"].combine_chunks())))
            if len(table):
                yield table

    def known(self, table: pa.Table) -> pa.Table:
        """User rows as a shard stores them with UNKNOWN in place of what is not known here."""
        return self._masked(table, {"item": self.record.num_items} if self.record.new_items else {})

    def iter_early(self, split: str) -> Iterator[pa.Table]:
        """Events of a split that are no targets, since their users have too few events before them (data.min_history):
        one table for each file, of user rows that hold nothing else."""
        for file in self.record.early.get(split, []):
            yield self.read(file)

    def items(self) -> pa.Table:
        """Columns item (the original key), count and encoded features; row i is item id i."""
        table = self.read_file(ITEMS).slice(0, self.record.num_items)
        if "count_valid" in table.column_names:  # else prepared before there was that column
            count = pc.add(table["count"], table["count_valid"]) if self.refit else table["count"]
            table = table.set_column(table.column_names.index("count"), "count", count).drop_columns(["count_valid"])
        return self._masked(table, {})

    def item_counts(self) -> np.ndarray:
        """(N,) int64 training events of each item id, for a refit those of validation too; 0 for PAD and UNKNOWN."""
        return np.asarray(self.items()["count"].to_numpy())

    def user_keys(self) -> pa.Table:
        """Columns user_id and user (the original key), one row per user."""
        return pa.concat_tables([self.read_file(file) for file in self.user_files])

    @property
    def user_files(self) -> list[str]:
        """Files of `user_keys`, one for every bucket of users."""
        return sorted(file for file in self.record.files if file.startswith("users/"))

    def _masked(self, table: pa.Table, sizes: Mapping[str, int]) -> pa.Table:
        """The table with UNKNOWN in place of ids from `sizes[column]` on, and of values of features that are not known."""
        columns = {f.column: f.cardinality for f in self.record.features if f.new_values}
        for name, size in {**sizes, **columns}.items():
            if name not in table.column_names:
                continue
            column = _below(table[name].combine_chunks(), size)
            table = table.set_column(table.column_names.index(name), name, column)
        return table


def _below(ids: pa.Array, size: int) -> pa.Array:
    """UNKNOWN in place of ids from `size` on; inside of lists, too, and of lists of lists (a list for every event)."""
    if pa.types.is_list(ids.type):
        return pa.ListArray.from_arrays(ids.offsets, _below(ids.values, size), type=ids.type)
    return pc.if_else(pc.less(ids, size), ids, pa.scalar(UNKNOWN, ids.type))
