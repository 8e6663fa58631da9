"""The training loop. It reads top to bottom and runs wherever a Context does, with Ray or without."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from recray import checkpoint, registry, storage
from recray.batches import ShardSlice, cut, item_table, padding_like, plan, steps_per_epoch
from recray.config import Config
from recray.data.prepared import PreparedDataset
from recray.errors import RecrayError
from recray.models import Examples
from recray.models.batch import Batch
from recray.models.losses import RetrievalObjective
from recray.records import CheckpointRecord
from recray.training import optim
from recray.training.context import Context
from recray.training.progress import Progress
from recray.training.validation import validate


def run(config: Config, context: Context, losses: list[float] | None = None) -> str:
    """Train on <run>/dataset; returns the folder of the best epoch. `losses` collects each step's global loss.

    Every epoch ends in a folder <run>/train/epoch-NNNN that training can go on from.
    """
    dataset = PreparedDataset.open(storage.join(config.run_uri, "dataset"))
    shards, items = dataset.record.shards["train"], item_table(dataset)
    torch.manual_seed(config.run.seed)
    model: nn.Module = registry.load("model", config.model.name).build(config.model, dataset.record, items)
    examples: Examples = model.examples  # type: ignore[assignment]
    moved_items = type(items)(items.counts_N.to(context.device), {})
    objective = context.wrap(RetrievalObjective(model, config.loss, moved_items, context))
    forward = torch.compile(objective) if config.training.compile else objective
    optimizer = optim.build(config.optim, model.parameters(), context.device)
    dtype = optim.precision(config.training.precision, context.device)
    scaler = torch.amp.GradScaler(context.device.type, enabled=dtype is torch.float16)
    ema = optim.Ema(model, config.optim.ema_decay)
    parts = config.training.accumulation_steps
    batch_size = config.training.global_batch_size // (context.world_size * parts)
    epoch_batches = -(-steps_per_epoch(shards, context.world_size, batch_size, examples) // parts) * parts
    progress_state = _Position.resume(config, dataset, model, optimizer, scaler, ema)
    # Workers draw different negatives; one worker draws as the loop without Ray does.
    torch.manual_seed(config.run.seed * 1_000_003 + progress_state.epoch * 1009 + context.rank)
    batches = _batches(config, dataset, context, examples, progress_state.epoch, batch_size, epoch_batches)
    progress = Progress(config.training.epochs, epoch_batches // parts, enabled=context.rank == 0)
    for epoch in range(progress_state.epoch, config.training.epochs):
        if progress_state.stopped(config):
            break
        progress.start_epoch(epoch)
        loss_sum = torch.zeros(2, dtype=torch.float64)
        rows = 0
        for _ in range(epoch_batches // parts):
            waited = time.perf_counter()
            micro = [next(batches) for _ in range(parts)]
            waited = time.perf_counter() - waited
            micro = [(batch.to(context.device, non_blocking=True), real) for batch, real in micro]
            rows += sum(batch.num_rows for batch, real in micro if real)
            weight = context.sum(torch.tensor([float(sum(b.weight_Q.sum() for b, _ in micro))], device=context.device))  # type: ignore[union-attr, misc]
            for group in optimizer.param_groups:
                group["lr"] = optim.learning_rate(
                    config.optim, progress_state.step, config.training.epochs * (epoch_batches // parts)
                )
            total = torch.zeros(1, device=context.device)
            for at, (batch, _) in enumerate(micro):
                with (
                    _synced(objective, at == parts - 1),
                    torch.autocast(context.device.type, dtype, enabled=dtype is not torch.float32),
                ):
                    loss, _ = forward(batch)
                # DDP averages over workers: times world_size over the global weight gives the global mean.
                scaler.scale(loss * (context.world_size / weight[0].clamp(min=1))).backward()
                total += loss.detach()
            total = context.sum(total) / weight.clamp(min=1)
            if not torch.isfinite(total):
                raise RecrayError(
                    f"the loss is {float(total)} at step {progress_state.step} (epoch {epoch}): lower optim.learning_rate, "
                    f"set optim.clip_norm = 1.0, or training.precision = 'fp32'"
                )
            if config.optim.clip_norm:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            ema.update()
            progress_state.step += 1
            if losses is not None:
                losses.append(float(total))
            loss_sum += torch.tensor([float(total) * float(weight), float(weight)], dtype=torch.float64)
            progress.step(float(total), events=float(weight), waited=waited)
        seen = int(context.sum(torch.tensor([float(rows)], dtype=torch.float64)))
        expected = sum(s.events if examples == "events" else s.rows for s in shards)
        assert seen == expected, f"epoch {epoch} consumed {seen} rows of {expected}"
        entry = {"epoch": epoch + 1.0, "loss": float(loss_sum[0] / loss_sum[1]), **progress.end_epoch()}
        if (epoch + 1) % config.training.validate_every == 0 or epoch + 1 == config.training.epochs:
            entry[config.training.metric] = _validate(config, model, ema, dataset, context)
        progress.report(entry)
        progress_state.end_epoch(entry, seen, config.training.metric)
        if context.rank == 0:
            progress_state.save(config, dataset, model, optimizer, scaler, ema, items)
        context.sum(torch.zeros(1))  # nobody goes on, or away, before the epoch is on disk
    return progress_state.folder(config, progress_state.best_epoch)


def _validate(config: Config, model: nn.Module, ema: optim.Ema, dataset: PreparedDataset, context: Context) -> float:
    own = None
    if ema.decay:
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(ema.weights())
    value = validate(
        model, dataset, context, config.training.metric, config.model.history_length, config.evaluation.filter_seen
    )
    if own is not None:
        model.load_state_dict(own)
    return value


def _synced(module: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Gradients cross workers only with the last part of an accumulated batch."""
    if isinstance(module, nn.parallel.DistributedDataParallel) and not last:
        return module.no_sync()
    return contextlib.nullcontext()


def _batches(
    config: Config,
    dataset: PreparedDataset,
    context: Context,
    examples: Examples,
    first_epoch: int,
    batch_size: int,
    epoch_batches: int,
) -> Iterator[tuple[Batch, bool]]:
    """Exactly `epoch_batches` batches an epoch; False marks one that only pads."""
    shards, seed = dataset.record.shards["train"], config.run.seed
    epochs = range(first_epoch, config.training.epochs)
    plans = {e: plan(shards, seed, e, context.rank, context.world_size, examples) for e in epochs}
    tables = context.tables(dataset, "train", [part for e in epochs for part in plans[e]])
    batch: Batch | None = None
    for epoch in epochs:
        mine: Iterator[tuple[ShardSlice, Any]] = (next(tables) for _ in plans[epoch])
        made = 0
        for batch in cut(mine, batch_size, examples, config.model.history_length, seed):
            yield batch, True
            made += 1
        while made < epoch_batches:
            if batch is None:  # this worker has no examples at all
                one = storage.read_table(dataset.shard_uri("train", 0)).slice(0, 1)
                batch = next(cut([(ShardSlice(0, 0, 0, 1), one)], 1, examples, config.model.history_length, seed))
            yield padding_like(batch), False
            made += 1


class _Position:
    """How far training is, and where it goes on from."""

    def __init__(self) -> None:
        self.epoch, self.step, self.rows, self.bad = 0, 0, 0, 0
        self.best_epoch, self.best = 0, float("-inf")
        self.history: list[dict[str, float]] = []

    @staticmethod
    def folder(config: Config, epoch: int) -> str:
        return storage.join(config.run_uri, "train", f"epoch-{epoch:04d}")

    @classmethod
    def resume(
        cls,
        config: Config,
        dataset: PreparedDataset,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        ema: optim.Ema,
    ) -> _Position:
        """The last epoch on disk of this configuration and dataset, or the beginning."""
        position = cls()
        last = last_epoch(config, dataset) if config.training.resume else 0
        if not last:
            return position
        folder = cls.folder(config, last)
        state = checkpoint.load_state(folder)
        model.load_state_dict(checkpoint.load_weights(folder) if not ema.decay else state["raw"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        if ema.decay:
            ema.shadow = {n: t.to(ema.shadow[n].device) for n, t in checkpoint.load_weights(folder).items()}
        for name in ("epoch", "step", "rows", "bad", "best_epoch", "best", "history"):
            setattr(position, name, state[name])
        return position

    def stopped(self, config: Config) -> bool:
        return bool(config.training.patience) and self.bad >= config.training.patience

    def end_epoch(self, entry: dict[str, float], rows: int, metric: str) -> None:
        self.epoch += 1
        self.rows += rows
        self.history.append(entry)
        if metric not in entry:
            return
        if entry[metric] > self.best:
            self.best, self.best_epoch, self.bad = entry[metric], self.epoch, 0
        else:
            self.bad += 1

    def save(
        self,
        config: Config,
        dataset: PreparedDataset,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        ema: optim.Ema,
        items: Any,
    ) -> None:
        """Write this epoch's folder, then delete the ones that are neither best nor last."""
        state = {
            **{n: getattr(self, n) for n in ("epoch", "step", "rows", "bad", "best_epoch", "best", "history")},
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
        }
        if ema.decay:
            state["raw"] = model.state_dict()
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
        )
        checkpoint.save(self.folder(config, self.epoch), ema.weights(), items, dataset.record, record, state)
        for epoch in range(1, self.epoch):
            if epoch != self.best_epoch:
                storage.delete_folder(self.folder(config, epoch))


_STEERING = ("model", "loss", "optim", "data")


def same_training(config: Config, record: CheckpointRecord, dataset: PreparedDataset) -> bool:
    """Whether a checkpoint was made by this configuration from this dataset."""
    now, then = config.model_dump(mode="json"), record.config
    return record.parents == [dataset.record.id] and all(now[name] == then.get(name) for name in _STEERING)


def last_epoch(config: Config, dataset: PreparedDataset) -> int:
    """The last complete epoch on disk that this configuration can go on from; 0 when there is none."""
    root = storage.join(config.run_uri, "train")
    if not storage.exists(root):
        return 0
    for epoch in range(config.training.epochs, 0, -1):
        folder = _Position.folder(config, epoch)
        if storage.exists(storage.join(folder, "checkpoint.json")):
            return epoch if same_training(config, CheckpointRecord.read(folder), dataset) else 0
    return 0
