"""Start from the weights of a checkpoint whose dataset has other ids (training.start_from).

Rows of embedding tables are found by key: items and users by their keys, categories by their values. Rows of ids that are
new start at the mean of the known ones; a new item with categorical features at the mean of the items that share them.
Weights whose shape has changed, such as the first layer after a feature was added, start as in a new training. The
optimizer starts anew.

Shape legend: N ids of this training, M ids of the checkpoint, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import torch
from torch import Tensor, nn

from recray import log
from recray.data import id_maps
from recray.data.dataset import PreparedDataset
from recray.errors import LineageError
from recray.ids import NUM_RESERVED, UNKNOWN
from recray.layers.embedding import Table
from recray.loading.batch import ItemTable
from recray.records import CheckpointRecord
from recray.training import checkpoint
from recray.training.sharded_tables import ShardedTables


@dataclass(frozen=True)
class WarmStart:
    """A checkpoint to start from, and the dataset that it was trained on."""

    checkpoint_uri: str
    dataset_uri: str
    seen_until: int | None = None  # time of the first event that it was not trained on; None: splits are not by time

    @staticmethod
    def of(checkpoint_uri: str, dataset: PreparedDataset) -> WarmStart:
        split = "test" if CheckpointRecord.read(checkpoint_uri).config["training"]["refit"] else "valid"
        timed = dataset.record.has_time and f"{split}_start" in dataset.record.split
        return WarmStart(checkpoint_uri, dataset.uri, dataset.record.starts(split) if timed else None)


def check(start: WarmStart, dataset: PreparedDataset) -> None:
    """Raise LineageError if the checkpoint was trained on test events of this dataset; warn of validation events."""
    seen, record = start.seen_until, dataset.record
    if seen is None:
        log.info("train", "splits are not by time: all train events are in every epoch (training.replay has no effect)")
        return
    if seen > record.starts("test"):
        raise LineageError(
            f"{start.checkpoint_uri} was trained on events up to {_shown(seen)}, and the test of {dataset.uri} begins at "
            f"{_shown(record.starts('test'))}: name an older checkpoint in training.start_from"
        )
    if seen > record.starts("valid"):
        log.warning(
            "train",
            f"the checkpoint was trained on events up to {_shown(seen)}, and validation begins at "
            f"{_shown(record.starts('valid'))}: its metrics are too good. The log has grown by less than data.split.valid",
        )


@torch.no_grad()
def apply(start: WarmStart, model: nn.Module, dataset: PreparedDataset, items: ItemTable) -> dict[str, float]:
    """Set a new model's weights. Every worker reads the rows of sharded tables that it holds.

    dataset: of this training, as the model knows it. Returns of each kind of ids the share that has a row in the checkpoint.
    """
    record = checkpoint.verify(start.checkpoint_uri)
    own = PreparedDataset.open(start.dataset_uri).known_to(record)
    weights = checkpoint.load_weights(start.checkpoint_uri)
    sharded = ShardedTables(start.checkpoint_uri, "tables", record.pieces)
    maps, matched, alike = _Maps(dataset, own), {}, _alike(items)
    tables = {f"{name}.weight": one for name, one in model.named_modules() if isinstance(one, Table)}
    state = model.state_dict()
    found = {name for name, weight in weights.items() if name not in tables and _shape(state, name) == weight.shape}
    model.load_state_dict({name: weights[name] for name in found}, strict=False)
    for name, table in tables.items():
        to_own_N = maps.of(table)
        rows = _Rows(name, sharded) if name in sharded.names() else weights.get(name)
        if to_own_N is None or rows is None or rows[torch.zeros(1, dtype=torch.int64)].shape[1] != table.embedding_dim:
            continue
        found.add(name)
        known_N = to_own_N[NUM_RESERVED:] >= NUM_RESERVED
        matched[table.column or f"{table.ids}s"] = float(known_N.float().mean()) if len(known_N) else 1.0
        _fill(table, to_own_N, rows, alike if table.ids == "item" else [])
    if fresh := sorted(state.keys() - found):
        log.warning("train", f"{len(fresh)} weights have no counterpart in the checkpoint: {', '.join(fresh[:3])}")
    return matched


def _shape(state: dict[str, Tensor], name: str) -> torch.Size | None:
    return state[name].shape if name in state else None


def _shown(time: int) -> str:
    return datetime.fromtimestamp(time / 1e6, UTC).isoformat(timespec="seconds")


class _Maps:
    """Ids of this training -> ids of the checkpoint, by kind of table; each is made once."""

    def __init__(self, asked: PreparedDataset, own: PreparedDataset) -> None:
        self._asked, self._own = asked, own
        self._made: dict[str, Tensor | None] = {}

    def of(self, table: Table) -> Tensor | None:
        """(N,) int64, UNKNOWN where the checkpoint has no row; None for a column that it does not know."""
        key = table.column or table.ids
        if key not in self._made:
            found = self._make(table)
            # Without a refit the vocabulary ends with values that this model does not know.
            self._made[key] = None if found is None else torch.from_numpy(found[: table.rows])
        return self._made[key]

    def _make(self, table: Table) -> np.ndarray | None:
        if table.ids == "item":
            return id_maps.items(self._asked, self._own)
        if table.ids == "user":
            return id_maps.users(self._asked, self._own, UNKNOWN)
        mine, other = (
            next((f for f in one.record.features if f.column == table.column), None) for one in (self._asked, self._own)
        )
        if mine is None or other is None or "numeric" in (mine.kind, other.kind):
            return None
        return id_maps.categories(mine, other)


@dataclass(frozen=True)
class _Rows:
    """The rows of a sharded table of a checkpoint, by id as those of a tensor (M, D)."""

    name: str
    sharded: ShardedTables

    def __getitem__(self, ids: Tensor) -> Tensor:
        return self.sharded.rows(self.name, ids)


def _fill(table: Table, to_own_N: Tensor, rows: Tensor | _Rows, alike: list[Tensor]) -> None:
    """Set a table's rows, those of new ids to means over the rows that this worker holds. alike: (N,) group of each id."""
    mine = slice(table.rank, None, table.world_size) if table.mode == "row_sharded" else slice(None)
    ids, to_own = torch.arange(len(to_own_N))[mine], to_own_N[mine]
    known = to_own >= NUM_RESERVED
    copied = known | (ids == UNKNOWN)
    table.weight[copied] = rows[to_own[copied]].to(table.weight)
    new = ~known & (ids >= NUM_RESERVED)
    if bool(known.any()) and bool(new.any()):
        table.weight[new] = _means(table.weight, known, new, [group[mine] for group in alike])


def _means(weight_ND: Tensor, known: Tensor, new: Tensor, groups: list[Tensor]) -> Tensor:
    """(new, D): the mean over groups of the mean of the known rows of the same group; of all known ones without any."""
    overall = weight_ND[known].mean(dim=0)
    total = torch.zeros(int(new.sum()), weight_ND.shape[1])
    found = torch.zeros(len(total), 1)
    for group in groups:
        size = int(group.max()) + 1
        sums = torch.zeros(size, weight_ND.shape[1]).index_add_(0, group[known], weight_ND[known])
        count = torch.bincount(group[known], minlength=size)[:, None]
        has = ((count > 0) & (torch.arange(size)[:, None] > UNKNOWN))[group[new]].float()
        total += has * (sums / count.clamp(min=1))[group[new]]
        found += has
    return torch.where(found > 0, total / found.clamp(min=1), overall)


def _alike(items: ItemTable) -> list[Tensor]:
    """(N,) ids of each categorical feature of the items."""
    return [one for one in items.features.values() if isinstance(one, Tensor) and not one.is_floating_point()]
