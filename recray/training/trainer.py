"""The training loop. It reads top to bottom and runs wherever a Context does, with Ray or without."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor, nn

from recray import registry, storage
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.data.split import duration
from recray.errors import ConfigError, RecrayError
from recray.layers import dice, embedding
from recray.loading.batch import Batch
from recray.loading.collate import item_table, iter_batches, padding_like
from recray.loading.examples import Decay
from recray.loading.prefetch import DeviceLoader
from recray.loading.sampler import ShardGroup, ShardSlice, epoch_plan, num_examples, steps_per_epoch
from recray.losses.base import Objective
from recray.models import Examples, Ranker
from recray.training import fsdp, optim
from recray.training.accumulate import Accumulation
from recray.training.console import Progress
from recray.training.distributed import Context, keep_memory, without_cudnn_attention
from recray.training.embedding_plan import table_plan
from recray.training.state import Phase, Position, refit_phase
from recray.training.validate import validate, validate_clicks

OnEpoch = Callable[[dict[str, float]], None]


def fit(
    config: Config,
    context: Context,
    losses: list[float] | None = None,
    on_epoch: OnEpoch | None = None,
    until: int | None = None,
) -> None:
    """Train on config.dataset_uri until the best epoch is known, then refit where the configuration says so.

    `on_epoch` is called with each epoch's entry of the history, once the epoch is on disk, on every worker alike.
    `until`: no further than so many epochs, and no refit.
    """
    keep_memory()
    select = Phase("train", config.training.epochs)
    run(config, context, select, losses, on_epoch, until)
    if config.training.refit and until is None:
        dataset = PreparedDataset.open(config.dataset_uri)
        run(config, context, refit_phase(config, dataset), losses)


def run(
    config: Config,
    context: Context,
    phase: Phase,
    losses: list[float] | None = None,
    on_epoch: OnEpoch | None = None,
    until: int | None = None,
) -> None:
    """Train a phase, at most `until` so many of its epochs; the threads that feed it end with it, however it ends."""
    with contextlib.ExitStack() as closing:
        closing.enter_context(without_cudnn_attention())
        _run(config, context, phase, losses, on_epoch, until, closing)


def _run(
    config: Config,
    context: Context,
    phase: Phase,
    losses: list[float] | None,
    on_epoch: OnEpoch | None,
    until: int | None,
    closing: contextlib.ExitStack,
) -> None:
    """Train on config.dataset_uri. `losses` collects each step's global loss.

    Every epoch ends in a folder <run>/<phase>/epoch-NNNN that training can go on from.
    """
    dataset = PreparedDataset.open(config.dataset_uri)
    if config.model.family == "ranker" and not dataset.record.labelled:
        raise ConfigError(
            f"model.name = '{config.model.name}' learns from what was chosen and what was not, and {dataset.uri} has no labels: "
            f"set data.columns.label, or data.negatives to draw what was not chosen, and run `recray prepare` again"
        )
    shards, items = phase.shards(dataset), item_table(dataset)
    torch.manual_seed(config.run.seed)
    places = table_plan(config, context, items.num_items)
    with embedding.use_plan(places):
        model: nn.Module = registry.load("model", config.model.name, config.run.plugins).build(
            config.model, dataset.record, items
        )
    if places.reasons and context.rank == 0 and phase.name == "train":
        print(f"train: large tables: {places.explain()}", flush=True)
    examples: Examples = model.examples  # type: ignore[assignment]
    moved_items = type(items)(items.counts_N.to(context.device), {})
    objective = context.wrap(Objective(model, config.loss, moved_items, context, config.run.plugins))
    forward = torch.compile(objective) if config.training.compile else objective
    optimizer = optim.Optimizers(config.optim, model)
    dtype = optim.precision(config.training.precision, context.device)
    scaler = torch.amp.GradScaler(context.device.type, enabled=dtype is torch.float16)
    shared_out = context.world_size > 1 and config.scaling.fsdp
    if shared_out and scaler.is_enabled():
        raise ConfigError("scaling.fsdp = true does not go with fp16: set training.precision = 'bf16' or 'fp32'")
    together = context.world_size > 1 and (config.loss.gathers or shared_out or embedding.waits_in_forward(model))
    accumulate = Accumulation(objective, forward, scaler, dtype, context, together)
    ema = optim.Ema(model, config.optim.ema_decay)
    parts = config.training.accumulation_steps
    batch_size = config.training.global_batch_size // (context.world_size * parts)
    epoch_batches = -(-steps_per_epoch(shards, context.world_size, batch_size, examples) // parts) * parts
    position = Position.resume(config, phase, dataset, model, optimizer, scaler, ema)
    epochs = range(position.epoch, phase.epochs if until is None else min(until, phase.epochs))
    plans = {e: epoch_plan(shards, config.run.seed, e, context.rank, context.world_size, examples) for e in epochs}
    tables = context.tables(dataset, shards, [part for parts in plans.values() for part in parts])
    make = _Batches(config, dataset, shards, plans, examples, batch_size, epoch_batches, _decay(config, dataset, phase))
    batches = closing.enter_context(DeviceLoader(tables, make, context.device))
    progress = Progress(phase.name, phase.epochs, epoch_batches // parts, enabled=context.rank == 0)
    for epoch in epochs:
        if phase.name == "train" and position.stopped(config):
            break
        progress.start_epoch(epoch)
        # An epoch's draws are its own, whatever was trained before it in this process. Workers draw different negatives;
        # one worker draws as the loop without Ray does.
        torch.manual_seed(config.run.seed * 1_000_003 + epoch * 1009 + context.rank)
        loss_sum = torch.zeros(2, dtype=torch.float64)
        rows = 0
        for _ in range(epoch_batches // parts):
            waited = time.perf_counter()
            micro = [next(batches) for _ in range(parts)]
            waited = time.perf_counter() - waited
            rows += sum(batch.num_rows for batch, real in micro if real)
            weight, events = context.sum(_amounts(micro).to(context.device))
            weight = torch.where(weight > 0, weight, torch.ones_like(weight))
            total_steps = phase.epochs * (epoch_batches // parts)
            optimizer.set_learning_rate(optim.learning_rate(config.optim, position.step, total_steps))
            total = accumulate([batch for batch, _ in micro], weight)
            embedding.sync(model, scaler.is_enabled())
            dice.sync(model)
            total = context.sum(total) / weight
            if not torch.isfinite(total):
                raise RecrayError(
                    f"the loss is {float(total)} at step {position.step} (epoch {epoch}): lower optim.learning_rate, "
                    f"set optim.clip_norm = 1.0, or training.precision = 'fp32'"
                )
            if config.optim.clip_norm:
                optimizer.clip(scaler, config.optim.clip_norm)
            optimizer.step(scaler)
            ema.update()
            position.step += 1
            if losses is not None:
                losses.append(float(total))
            loss_sum += torch.tensor([float(total) * float(weight), float(weight)], dtype=torch.float64)
            progress.step(float(total), events=float(events), waited=waited)
        seen = int(context.sum(torch.tensor([float(rows)], dtype=torch.float64)))
        expected = sum(num_examples(shard, examples) for shard in shards)
        assert seen == expected, f"epoch {epoch} consumed {seen} rows of {expected}"
        entry = {
            "epoch": epoch + 1.0,
            "loss": float(loss_sum[0] / loss_sum[1]),
            **progress.end_epoch(batches.seconds()),
        }
        due = (epoch + 1) % config.training.validate_every == 0 or epoch + 1 == phase.epochs
        if due and phase.name == "train":
            started = time.perf_counter()
            entry[config.training.metric] = _validate(config, objective, model, ema, dataset, context)
            entry["validation_seconds"] = time.perf_counter() - started
        progress.report(entry)
        position.end_epoch(entry, seen, config)
        position.save_tables(config, phase, model, optimizer, context)
        position.save(config, phase, dataset, model, optimizer, scaler, ema, items, context)
        context.sum(torch.zeros(1, device=context.device))  # nobody goes on, or away, before the epoch is on disk
        if on_epoch is not None:
            on_epoch(entry)


def _amounts(micro: list[tuple[Batch, bool]]) -> Tensor:
    """Sum of weights, and number of queries that are no padding."""
    weights = [batch.weight_Q for batch, real in micro if real and batch.weight_Q is not None]
    return torch.tensor([float(sum(w.sum() for w in weights)), float(sum(map(len, weights)))])


def _decay(config: Config, dataset: PreparedDataset, phase: Phase) -> Decay | None:
    """Raises ConfigError where the dataset knows no times."""
    if config.training.half_life is None:
        return None
    if not dataset.record.has_time:
        raise ConfigError("training.half_life needs times, and this dataset has positions only: leave it out")
    until = dataset.record.starts("valid" if phase.name == "train" else "test")
    return Decay(until, duration(config.training.half_life))


def _validate(
    config: Config, objective: nn.Module, model: nn.Module, ema: optim.Ema, dataset: PreparedDataset, context: Context
) -> float:
    own = None
    if ema.decay:
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(ema.weights())
    length = config.model.history_length
    with fsdp.together(objective):
        if isinstance(model, Ranker):
            value = validate_clicks(model, dataset, context, config.training.metric, length, config.run.plugins)
        else:
            value = validate(
                model, dataset, context, config.training.metric, length, config.evaluation, config.run.plugins
            )
    if own is not None:
        model.load_state_dict(own)
    return value


@dataclass(frozen=True)
class _Batches:
    """Tables to exactly `epoch_batches` batches an epoch; False marks one that only pads."""

    config: Config
    dataset: PreparedDataset
    shards: list[ShardGroup]
    plans: dict[int, list[ShardSlice]]  # by epoch
    examples: Examples
    batch_size: int
    epoch_batches: int
    decay: Decay | None

    def __call__(self, tables: Iterator[tuple[ShardSlice, pa.Table]]) -> Iterator[tuple[Batch, bool]]:
        batch: Batch | None = None
        for parts in self.plans.values():
            made = 0
            for batch in self._cut(next(tables) for _ in parts):
                yield batch, True
                made += 1
            for _ in range(made, self.epoch_batches):
                if batch is None:  # this worker has no examples at all
                    one = storage.read_table(self.dataset.file_uri(self.shards[0].files[0])).slice(0, 1)
                    batch = next(self._cut([(ShardSlice(0, 0, 0, 1), one)]))
                yield padding_like(batch), False

    def _cut(self, tables: Iterable[tuple[ShardSlice, pa.Table]]) -> Iterator[Batch]:
        length, seed = self.config.model.history_length, self.config.run.seed
        return iter_batches(tables, self.batch_size, self.examples, length, seed, self.decay)
