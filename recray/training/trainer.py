"""The training loop. It runs wherever a Context does, with Ray or without.

    trainer = Trainer(config, dataset, phase, LocalContext())
    trainer.state.load(phase.folder(3))     # to resume after epoch 3
    trainer.fit()

`fit` runs epochs: `train_epoch`, `validate`, save. `train_epoch` runs steps: `train_step` computes the gradients of a
global batch, which all workers share, and updates the weights. Every worker runs the same code, so every decision
(a non-finite loss, early stopping) is made from numbers that were summed over workers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from recray import log
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.digests import FileDigest
from recray.errors import ConfigError, DataError, Interrupted, RecrayError
from recray.layers import embedding
from recray.layers.hooks import run_hooks, step_hooks
from recray.loading.batch import Batch, ItemTable
from recray.loading.collate import item_table
from recray.loading.prefetch import DeviceLoader
from recray.losses.base import Objective
from recray.metrics import higher_is_better
from recray.models import Ranker, Retriever, build_model
from recray.records import CheckpointRecord
from recray.training import checkpoint, fsdp, optim, warm_start
from recray.training.accumulate import Accumulation
from recray.training.batches import TrainingData
from recray.training.check import check_labels
from recray.training.console import Progress
from recray.training.distributed import Context, without_cudnn_attention
from recray.training.embedding_plan import table_plan
from recray.training.phase import Phase, Position
from recray.training.saving import Flags, Saver, digests
from recray.training.state import TrainProgress, TrainState
from recray.training.validate import validate
from recray.training.warm_start import WarmStart

OnEpoch = Callable[[dict[str, float]], None]
MicroBatches = list[tuple[Batch, bool]]  # of one step; False marks padding


class Step(NamedTuple):
    """Of one optimizer step, over all workers."""

    loss: float  # weighted mean
    weight: float  # sum of the weights of queries
    queries: float  # number of queries
    rows: float  # number of training examples
    flags: Flags


class Trainer:
    """Trains one phase on one worker. Every epoch ends in `phase.folder(epoch)`, which training can resume from."""

    def __init__(
        self,
        config: Config,
        dataset: PreparedDataset,
        phase: Phase,
        context: Context,
        stop: Callable[[], bool] = lambda: False,
        start: WarmStart | None = None,
    ) -> None:
        """stop: asked on every worker after each step; training saves its state and ends once it is true on one.

        start: the checkpoint whose weights the model begins with.
        """
        self.config, self.dataset, self.phase, self.context = config, dataset, phase, context
        check_labels(config, dataset)
        self.items = item_table(dataset)
        self.precision = optim.MixedPrecision(config.training.precision, context.device)
        _check_fsdp(config, context, self.precision)
        model = self._build_model()
        if start is not None:
            matched = warm_start.apply(start, model, dataset, self.items)
            if context.rank == 0:
                said = ", ".join(f"{share:.1%} of {name}" for name, share in matched.items())
                log.info(phase.name, f"ids that the checkpoint knows: {said}", event="matched", values=matched)
        self.objective = context.wrap(_objective(config, model, self.items, context))
        # After `wrap`: FSDP replaces the parameters that optimizers and averages refer to.
        optimizers, ema = optim.Optimizers(config.optim, model), optim.Ema(model, config.optim.ema_decay)
        self.state = TrainState(model, optimizers, self.precision.scaler, ema)
        self.hooks = step_hooks(model)
        self.accumulate = Accumulation(
            self.objective, self.precision, context, self._forward_waits(), compiled=config.training.compile
        )
        self.data = TrainingData(config, dataset, phase, model.examples, context, start)
        _check_warmup(config, phase, self.data.steps)
        self.stop, self.stepped = stop, False
        self.saver = Saver(self.state, context, phase, config.training.save_every, self._record, self._save_record)
        self.meter = Progress(phase.name, phase.epochs, self.data.steps, enabled=context.rank == 0)

    def fit(self, on_epoch: OnEpoch | None = None, until: int | None = None) -> TrainProgress:
        """Train until the last epoch, until `until` epochs are complete, or until training.patience runs out.

        on_epoch: called on every worker with the epoch's entry of the history, once the epoch is on disk.

        Raises RecrayError if the loss, the weights or the validation scores are not finite; that epoch is not saved.
        Raises Interrupted if training was asked to stop; the state of the last step is saved.
        """
        last = self.phase.epochs if until is None else min(until, self.phase.epochs)
        epochs = range(self.state.progress.epoch, last)
        # The loader reads ahead over the borders of epochs: no epoch waits for its first batch but the first.
        with without_cudnn_attention(), self.data.loader(epochs, self.state.progress.segments) as batches:
            for epoch in epochs:
                if self._out_of_patience():
                    break
                entry = self.train_epoch(epoch, batches)
                if self._validates(epoch):
                    entry |= self.validate()
                self._end_epoch(entry)
                if on_epoch is not None:
                    on_epoch(entry)
        return self.state.progress

    def train_epoch(self, epoch: int, batches: DeviceLoader) -> dict[str, float]:
        """The steps of an epoch (from 0) that are left. Returns its entry of the history, without validation."""
        progress, sums = self.state.progress, self.state.progress.sums
        self.meter.start_epoch(epoch, sums.steps)
        before = sums.seconds
        for _ in range(self.data.steps_left(epoch, progress.segments)):
            started = time.perf_counter()
            with self.context.bounded(f"step {sums.steps + 1} of epoch {epoch + 1}", first=not self.stepped):
                micro = [next(batches) for _ in range(self.config.training.accumulation_steps)]
                waited = time.perf_counter() - started
                self._seed_draws(epoch, sums.steps)
                step = self.train_step(micro)
            self.stepped = True
            self.meter.step(step.loss, events=step.queries, waited=waited)
            sums.steps += 1
            sums.loss, sums.weight = sums.loss + step.loss * step.weight, sums.weight + step.weight
            sums.rows += int(step.rows)
            sums.seconds = before + self.meter.seconds
            progress.consume(self.context.world_size, self.data.rows_per_step)
            self._save_if_due(step.flags)
        if sums.rows != self.data.rows:
            raise RecrayError(f"the epoch consumed {sums.rows} rows of {self.data.rows}: this is a defect of recray")
        self._check_weights()
        if not sums.weight:
            raise DataError(
                f"all {self.data.rows:,} training examples have weight 0, so nothing is learned: check data.columns.weight"
            )
        entry = {"epoch": epoch + 1.0, "loss": sums.loss / sums.weight, **self.meter.end_epoch(batches.seconds())}
        return entry | {"seconds": before + entry["seconds"], "saving_seconds": self.saver.take_blocked()}

    def train_step(self, micro: MicroBatches) -> Step:
        """One optimizer step on the global batch, of which `micro` is this worker's part."""
        state, config = self.state, self.config.optim
        total_weight, queries, rows, *flags = self._exchange_amounts(micro)
        weight = torch.where(total_weight > 0, total_weight, torch.ones_like(total_weight))  # all rows weigh nothing
        rate = optim.learning_rate(config, state.progress.step, self.phase.epochs * self.data.steps)
        state.optimizers.set_learning_rate(rate)
        total = self.accumulate([batch for batch, _ in micro], weight)
        run_hooks(self.hooks, self.context.sum, state.scaler.is_enabled())
        loss = float(self.context.sum(total) / weight)
        if not math.isfinite(loss):
            at = f"step {state.progress.step} (epoch {state.progress.epoch + 1})"
            raise RecrayError(f"the loss is {loss} at {at}: {optim.steadier(self.config, self.context.device)}")
        if config.clip_norm:
            state.optimizers.clip(state.scaler, config.clip_norm)
        state.optimizers.step(state.scaler)
        state.ema.update()
        state.progress.step += 1
        return Step(loss, float(total_weight), float(queries), float(rows), Flags(*map(float, flags)))

    def _exchange_amounts(self, micro: MicroBatches) -> Tensor:
        """Sums over all workers: weights, queries and rows of batches that are no padding, and the flags of saving."""
        real = [batch for batch, is_real in micro if is_real]
        weights = [batch.weight_Q for batch in real if batch.weight_Q is not None]
        amounts = [float(sum(w.sum() for w in weights)), float(sum(map(len, weights)))]
        rows = float(sum(batch.num_rows for batch in real))
        own = torch.tensor([*amounts, rows, *self.saver.flags(self.stop())])
        return self.context.sum(own.to(self.context.device))

    def _seed_draws(self, epoch: int, step: int) -> None:
        """Seed dropout and negatives by where training is, so that a resumed training draws what an undisturbed one does.

        Workers must draw different negatives; a single worker draws the same with Ray and without.
        """
        entropy = [self.config.run.seed, epoch, step, self.context.rank]
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
        torch.default_generator.manual_seed(seed)
        if self.context.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _save_if_due(self, flags: Flags) -> None:
        self.saver.after_step(flags)
        if flags.stop:
            at = Position(self.state.progress.epoch, self.state.progress.sums.steps)
            raise Interrupted(f"training was asked to stop: {at} is saved; the same command resumes there")

    def validate(self) -> dict[str, float]:
        """The validation metric of the averaged weights, over all workers, and the seconds that it took."""
        started = time.perf_counter()
        with self.state.averaged(), fsdp.gathered(self.objective):
            value = validate(self.state.model, self.dataset, self.context, self.config)
        return {self.config.training.metric: value, "validation_seconds": time.perf_counter() - started}

    # Set-up --------------------------------------------------------------------------------------------------------

    def _build_model(self) -> Retriever | Ranker:
        """The same initial weights on every worker, but for the rows of sharded tables."""
        torch.manual_seed(self.config.run.seed)
        plan = table_plan(self.config, self.context, self.items.num_items)
        with embedding.use_plan(plan):
            model = build_model(self.config, self.dataset.record, self.items)
        if plan.reasons and self.context.rank == 0 and self.phase.name == "train":
            log.info("train", f"large tables: {plan.explain()}", event="tables", values=plan.reasons)
        return model

    def _forward_waits(self) -> bool:
        """Whether a forward waits for other workers: to gather positives, weights, or rows of tables."""
        gathers = self.config.scaling.fsdp or self.config.loss.gathers
        return self.context.world_size > 1 and (gathers or embedding.waits_in_forward(self.state.model))

    # End of an epoch -----------------------------------------------------------------------------------------------

    def _out_of_patience(self) -> bool:
        patience = self.config.training.patience
        stale = self.state.progress.epochs_without_improvement
        return self.phase.name == "train" and 0 < patience <= stale

    def _validates(self, epoch: int) -> bool:
        last = epoch + 1 == self.phase.epochs
        return self.phase.name == "train" and (last or (epoch + 1) % self.config.training.validate_every == 0)

    def _check_weights(self) -> None:
        """The update after a finite loss can still overflow. Such an epoch must be neither published nor resumed from."""
        names = self.state.non_finite()
        # Every worker has other rows of sharded tables: all must stop if one does.
        if float(self.context.sum(torch.tensor([float(len(names))]))) > 0:
            where = ", ".join(names[:3]) or "a table of another worker"
            raise RecrayError(
                f"the weights are not finite after epoch {self.state.progress.epoch + 1} ({where}), which was not saved: "
                f"{optim.steadier(self.config, self.context.device)}"
            )

    def _end_epoch(self, entry: dict[str, float]) -> None:
        # First: the record of a save inside the epoch must not tell, nor its clean-up follow, what the epoch's end decides.
        self.saver.wait()
        progress, context = self.state.progress, self.context
        metric = self.config.training.metric
        progress.end_epoch(entry, self.data.rows, metric, higher_is_better(metric, self.config.run.plugins))
        folder = self.phase.folder(progress.epoch)
        files = self.state.save(folder, context)
        if context.rank == 0:
            self._save_record(folder, self._record(), digests(folder, files, context.world_size))
        context.barrier()  # no worker may report the epoch, or end, before it is on disk
        self.saver.restart_clock()
        self.meter.report(entry)

    def _save_record(self, folder: str, record: CheckpointRecord, files: dict[str, FileDigest]) -> None:
        """Complete a saved state, on worker 0."""
        checkpoint.save_record(folder, record, self.dataset.record, self.items, files)
        self.phase.delete_old(self.state.progress.best_epoch)

    def _record(self) -> CheckpointRecord:
        progress, metric = self.state.progress, self.config.training.metric
        return CheckpointRecord(
            parents=[self.dataset.record.id],
            config=self.config.model_dump(mode="json"),
            epoch=progress.epoch,
            step=progress.step,
            rows=progress.rows,
            metric=metric,
            value=progress.history[-1].get(metric, 0.0) if progress.history else 0.0,
            best_epoch=progress.best_epoch,
            history=progress.history,
            dataset_uri=self.dataset.uri,
            seconds=sum(entry["seconds"] for entry in progress.history),
            pieces=self.state.table_files,
        )


def _objective(config: Config, model: nn.Module, items: ItemTable, context: Context) -> nn.Module:
    """Model and loss as one module: batch -> (weighted sum of losses, sum of weights)."""
    # A loss may need how often items occur, on the device; features stay where the model keeps them.
    counts = ItemTable(items.counts_N.to(context.device))
    return Objective(model, config.loss, counts, context, config.run.plugins)


def _check_warmup(config: Config, phase: Phase, steps: int) -> None:
    """A refit has the epochs that were best, however few; the selection before it was checked."""
    total, warmup = phase.epochs * steps, config.optim.warmup_steps
    if phase.name == "train" and warmup > total:
        raise ConfigError(
            f"optim.warmup_steps = {warmup:,} is more than the {total:,} steps of this training ({phase.epochs} epochs of "
            f"{steps:,}), which would end before it reaches optim.learning_rate: lower it, for example to {total // 10:,}"
        )


def _check_fsdp(config: Config, context: Context, precision: optim.MixedPrecision) -> None:
    if context.world_size > 1 and config.scaling.fsdp and precision.scaler.is_enabled():
        raise ConfigError("scaling.fsdp = true does not support fp16: set training.precision = 'bf16' or 'fp32'")
