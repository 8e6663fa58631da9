"""How far training is, on disk and in memory, and where it goes on from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recray import storage
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.errors import LineageError
from recray.layers import embedding
from recray.loading.sampler import ShardGroup
from recray.metrics import higher_is_better
from recray.records import CheckpointRecord, Shard
from recray.training import checkpoint, fsdp, optim, sharded_tables
from recray.training.distributed import Context
from recray.training.sharded_tables import ShardedTables


@dataclass(frozen=True)
class Phase:
    """Selection on validation ("train"), or what follows it: training anew on both splits for a known number of epochs."""

    name: Literal["train", "refit"]
    epochs: int

    def root(self, config: Config) -> str:
        # A refit of other length has another schedule: it is begun anew.
        return storage.join(config.run_uri, self.name, *([f"of-{self.epochs:04d}"] if self.name == "refit" else []))

    def folder(self, config: Config, epoch: int) -> str:
        return storage.join(self.root(config), f"epoch-{epoch:04d}")

    def shards(self, dataset: PreparedDataset) -> list[ShardGroup]:
        """Train's shards; for refit each with the validation shard of the same users, so that batches mix both."""
        shards = dataset.record.shards
        if self.name == "train":
            return [ShardGroup.of(shard) for shard in shards["train"]]
        by_bucket: dict[str, list[Shard]] = {}
        for shard in shards["train"] + shards["valid"]:
            by_bucket.setdefault(shard.file.rpartition("/")[2], []).append(shard)
        return [ShardGroup.of(*group) for group in by_bucket.values()]


class Position:
    """How far a phase is."""

    def __init__(self) -> None:
        self.epoch, self.step, self.rows, self.bad = 0, 0, 0, 0
        self.best_epoch, self.best = 0, float("-inf")
        self.history: list[dict[str, float]] = []

    @classmethod
    def resume(
        cls,
        config: Config,
        phase: Phase,
        dataset: PreparedDataset,
        model: nn.Module,
        optimizer: optim.Optimizers,
        scaler: torch.amp.GradScaler,
        ema: optim.Ema,
    ) -> Position:
        """The last epoch on disk of this configuration and dataset, or the beginning."""
        position = cls()
        last = last_epoch(config, phase, dataset) if config.training.resume else 0
        if not last:
            return position
        folder = phase.folder(config, last)
        state = checkpoint.load_state(folder)
        weights = checkpoint.load_weights(folder) if not ema.decay else state["raw"]
        _load_tables(folder, state["tables"], weights, model, optimizer)
        # In the model's order, for workers exchange them; a file may give another to each.
        weights = {n: fsdp.like(weights[n], own) for n, own in model.state_dict().items() if n in weights}
        model.load_state_dict(weights | {name: table.weight for name, table in embedding.tables(model).items()})
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        if ema.decay:
            found = checkpoint.load_weights(folder)
            ema.shadow = {n: fsdp.like(found[n].to(own.device), own) for n, own in ema.shadow.items()}
        for name in ("epoch", "step", "rows", "bad", "best_epoch", "best", "history"):
            setattr(position, name, state[name])
        return position

    def stopped(self, config: Config) -> bool:
        return bool(config.training.patience) and self.bad >= config.training.patience

    def end_epoch(self, entry: dict[str, float], rows: int, config: Config) -> None:
        metric = config.training.metric
        self.epoch += 1
        self.rows += rows
        self.history.append(entry)
        if metric not in entry:
            return
        value = entry[metric] if higher_is_better(metric, config.run.plugins) else -entry[metric]
        if value > self.best:
            self.best, self.best_epoch, self.bad = value, self.epoch, 0
        else:
            self.bad += 1

    def save_tables(
        self, config: Config, phase: Phase, model: nn.Module, optimizer: optim.Optimizers, context: Context
    ) -> None:
        """Every worker writes its rows of sharded tables, before worker 0 writes the rest."""
        sharded = embedding.sharded(model)
        if not sharded:
            return
        folder, rank, count = phase.folder(config, self.epoch), context.rank, context.world_size
        sharded_tables.write(folder, "tables", rank, count, {name: table.weight for name, table in sharded.items()})
        state = optimizer.table_state()
        kept = {f"{n}:{key}": value for n in sharded for key, value in state[n].items() if isinstance(value, Tensor)}
        sharded_tables.write(folder, "tables-state", rank, count, kept)
        context.sum(torch.zeros(1, device=context.device))  # all are on disk

    def save(
        self,
        config: Config,
        phase: Phase,
        dataset: PreparedDataset,
        model: nn.Module,
        optimizer: optim.Optimizers,
        scaler: torch.amp.GradScaler,
        ema: optim.Ema,
        items: Any,
        context: Context,
    ) -> None:
        """Worker 0 writes this epoch's folder, then deletes the ones that are neither best nor last.

        All workers call it: of what is shared out each holds a part.
        """
        sharded = embedding.sharded(model)
        tables = optimizer.table_state()
        for name in sharded:
            tables[name] = {key: value for key, value in tables[name].items() if not isinstance(value, Tensor)}
        state = {
            **{n: getattr(self, n) for n in ("epoch", "step", "rows", "bad", "best_epoch", "best", "history")},
            "optimizer": optimizer.state_dict(),
            "tables": tables,
            "scaler": scaler.state_dict(),
        }
        if ema.decay:
            state["raw"] = fsdp.whole(model.state_dict())
        metric = config.training.metric
        record = CheckpointRecord(
            parents=[dataset.record.id],
            config=config.model_dump(mode="json"),
            epoch=self.epoch,
            step=self.step,
            rows=self.rows,
            metric=metric,
            value=self.history[-1].get(metric, float("nan")) if metric in self.history[-1] else 0.0,
            history=self.history,
            dataset_uri=dataset.uri,
            seconds=sum(entry["seconds"] for entry in self.history),
            pieces=max((table.world_size for table in sharded.values()), default=0),
        )
        weights = fsdp.whole({name: tensor for name, tensor in ema.weights().items() if name not in sharded})
        if context.rank != 0:
            return
        checkpoint.save(phase.folder(config, self.epoch), weights, items, dataset.record, record, state)
        for epoch in range(1, self.epoch):
            if epoch != self.best_epoch:
                storage.delete_folder(phase.folder(config, epoch))


def _load_tables(
    folder: str,
    state: dict[str, dict[str, Any]],
    weights: dict[str, Tensor],
    model: nn.Module,
    optimizer: optim.Optimizers,
) -> None:
    """Rows of tables and what their optimizer keeps, which may have been on another number of workers.

    Takes them out of `weights`. Raises LineageError where a table had touched rows updated and now has all, or else.
    """
    found, count = embedding.tables(model), CheckpointRecord.read(folder).pieces
    if found.keys() != state.keys():
        raise LineageError(
            f"in {folder} only touched rows of {', '.join(state) or 'no table'} are updated, now of "
            f"{', '.join(found) or 'none'}: train with the scaling of then, or set training.resume = false to begin anew"
        )
    rows, kept = ShardedTables(folder, "tables", count), ShardedTables(folder, "tables-state", count)
    for name, table in found.items():
        first, step = (table.rank, table.world_size) if table.mode == "row_sharded" else (0, 1)
        if name in weights:  # every worker had all rows
            table.weight.data.copy_(weights.pop(name)[first::step])
        else:
            rows.fill(name, table.weight.data, first, step)
        device = table.weight.device
        mine = {k: v[first::step].to(device) if isinstance(v, Tensor) else v for k, v in state[name].items()}
        for key in [key for key in kept.names() if key.startswith(f"{name}:")]:
            wide = not key.endswith(":sum")
            out = torch.empty_like(table.weight.data if wide else table.weight.data[:, 0])
            kept.fill(key, out, first, step)
            mine[key.removeprefix(f"{name}:")] = out
        optimizer.load_table_state(name, mine)


def same_training(config: Config, record: CheckpointRecord, dataset: PreparedDataset) -> bool:
    """Whether a checkpoint was made by this configuration, up to how long it trains, from this dataset."""
    now, then = _steering(config.model_dump(mode="json")), _steering(record.config)
    return record.parents == [dataset.record.id] and now == then


def _steering(config: dict[str, Any]) -> list[Any]:
    training = [config["training"].get(name) for name in ("global_batch_size", "accumulation_steps", "half_life")]
    others = (config[name] for name in ("model", "optim", "data"))
    return [config["run"]["seed"], *training, loss_that_steers(config["loss"]), *others]


def loss_that_steers(loss: dict[str, Any]) -> dict[str, Any]:
    """Of the [loss] of a record, what changes training and not only how fast it is."""
    return {key: value for key, value in loss.items() if key != "chunk_size"}


def last_epoch(config: Config, phase: Phase, dataset: PreparedDataset) -> int:
    """The last complete epoch on disk that this configuration can go on from; 0 when there is none."""
    if not storage.exists(phase.root(config)):
        return 0
    for epoch in range(phase.epochs, 0, -1):
        folder = phase.folder(config, epoch)
        if storage.exists(storage.join(folder, "checkpoint.json")):
            return epoch if same_training(config, CheckpointRecord.read(folder), dataset) else 0
    return 0


def refit_phase(config: Config, dataset: PreparedDataset) -> Phase:
    """As many epochs as selection found best."""
    return Phase("refit", best_epoch(config, dataset))


def best_epoch(config: Config, dataset: PreparedDataset) -> int:
    """The epoch of the finished selection with the best validation metric."""
    select = Phase("train", config.training.epochs)
    state = checkpoint.load_state(select.folder(config, last_epoch(config, select, dataset)))
    return int(state["best_epoch"])
