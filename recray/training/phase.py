"""One phase of training: which shards it trains on, for how many epochs, and where its epochs are kept.

"train" (selection) trains on the train split and validates. "refit" trains a fresh model on train and validation events
together, for the number of epochs that selection found best. Each keeps its best epoch and the two newest states:

    <root>/epoch-0002/                  best so far
           epoch-0005/
           epoch-0005-step-00001200/    1,200 steps into epoch 6; training resumes from it
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from recray import layout, storage
from recray.data.dataset import PreparedDataset
from recray.loading.sampler import ShardGroup
from recray.records import CheckpointRecord, Shard


class Position(NamedTuple):
    """Where in a phase training is."""

    epoch: int  # complete ones
    steps: int = 0  # of the next one

    def __str__(self) -> str:
        return f"step {self.steps} of epoch {self.epoch + 1}" if self.steps else f"epoch {self.epoch}"


_FOLDER = re.compile(r"epoch-(\d+)(?:-step-(\d+))?")


@dataclass(frozen=True)
class Phase:
    name: Literal["train", "refit"]
    epochs: int  # of the whole phase; the learning rate schedule ends with the last one
    root: str  # folder of its epochs

    def folder(self, epoch: int, steps: int = 0) -> str:
        """The folder of a position."""
        return storage.join(self.root, f"epoch-{epoch:04d}" + (f"-step-{steps:08d}" if steps else ""))

    def last_epoch(self) -> int:
        """The last complete epoch on disk, at most `epochs`; 0 if there is none."""
        return max((at.epoch for at in self.saved() if not at.steps), default=0)

    def saved(self) -> list[Position]:
        """The positions that training can resume from, newest first."""
        # The record is written last: a folder without one was interrupted.
        name = CheckpointRecord.file_name()
        found = sorted((at for at in self._on_disk() if at.epoch <= self.epochs), reverse=True)
        return [at for at in found if storage.exists(storage.join(self.folder(*at), name))]

    def delete_old(self, best: int) -> None:
        """Delete all positions but the two newest and the best epoch: the newest one may turn out to be damaged."""
        newest = self.saved()[:2]
        for at in self._on_disk():
            if len(newest) == 2 and at < newest[1] and at != Position(best):
                layout.clear(self.folder(*at), layout.EPOCH)

    def shards(self, dataset: PreparedDataset) -> list[ShardGroup]:
        """The shards to train on. A refit joins the train and validation shards of the same users, so that batches mix both."""
        shards = dataset.record.shards
        if self.name == "train":
            return [ShardGroup.of(shard) for shard in shards["train"]]
        by_bucket: dict[str, list[Shard]] = {}
        for shard in shards["train"] + shards["valid"]:
            by_bucket.setdefault(shard.file.rpartition("/")[2], []).append(shard)
        return [ShardGroup.of(*group) for group in by_bucket.values()]

    def _on_disk(self) -> list[Position]:
        found = [_FOLDER.fullmatch(name) for name in storage.list_folders(self.root)]
        return [Position(int(one[1]), int(one[2] or 0)) for one in found if one]
