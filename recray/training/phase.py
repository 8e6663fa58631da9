"""One phase of training: which shards it trains on, for how many epochs, and where its epochs are kept.

"train" (selection) trains on the train split and validates. "refit" trains a fresh model on train and validation events
together, for the number of epochs that selection found best. Each keeps its best and its last epoch:

    <root>/epoch-0002/      best so far
           epoch-0005/      last; training resumes from it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recray import storage
from recray.data.dataset import PreparedDataset
from recray.loading.sampler import ShardGroup
from recray.records import CheckpointRecord, Shard


@dataclass(frozen=True)
class Phase:
    name: Literal["train", "refit"]
    epochs: int  # of the whole phase; the learning rate schedule ends with the last one
    root: str  # folder of its epochs

    def folder(self, epoch: int) -> str:
        return storage.join(self.root, f"epoch-{epoch:04d}")

    def last_epoch(self) -> int:
        """The last complete epoch on disk, at most `epochs`; 0 if there is none."""
        for epoch in sorted(self._on_disk(), reverse=True):
            # The record is written last: a folder without one was interrupted.
            if epoch <= self.epochs and storage.exists(storage.join(self.folder(epoch), CheckpointRecord.file_name())):
                return epoch
        return 0

    def delete_before(self, last: int, best: int) -> None:
        """Delete the epochs before `last`, except `best`."""
        for epoch in self._on_disk():
            if epoch < last and epoch != best:
                storage.delete_folder(self.folder(epoch))

    def shards(self, dataset: PreparedDataset) -> list[ShardGroup]:
        """The shards to train on. A refit joins the train and validation shards of the same users, so that batches mix both."""
        shards = dataset.record.shards
        if self.name == "train":
            return [ShardGroup.of(shard) for shard in shards["train"]]
        by_bucket: dict[str, list[Shard]] = {}
        for shard in shards["train"] + shards["valid"]:
            by_bucket.setdefault(shard.file.rpartition("/")[2], []).append(shard)
        return [ShardGroup.of(*group) for group in by_bucket.values()]

    def _on_disk(self) -> list[int]:
        names = storage.list_folders(self.root)
        return [int(name.removeprefix("epoch-")) for name in names if name.startswith("epoch-")]
