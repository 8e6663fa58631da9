"""Forward and backward of one optimizer step, in as many parts as the accelerator's memory needs.

The global batch stays the same: the loss of a part is divided by the weight of the whole batch. A batch of 4,096 rows
that does not fit is run as 2 x 2,048, then 4 x 1,024, with the same gradients up to rounding; the number of parts is
kept for all later steps.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from recray import log
from recray.layers.hooks import step_hooks
from recray.loading.batch import Batch
from recray.loading.collate import padding_like
from recray.training.distributed import Context
from recray.training.optim import MixedPrecision

_AGREED_STEPS = 100  # steps in which several workers ask each other whether memory was enough


class Accumulation:
    """Computes the gradients of a step.

    On a single worker, a batch that runs out of memory is split and retried. Several workers must agree to retry, since
    each waits for the gradients of the others. In their first steps on GPUs they therefore compute gradients without
    exchanging them, ask each other, and exchange in one more backward, over a row that weighs nothing. Later steps skip
    this: memory that was enough for 100 batches is taken to be enough.
    """

    def __init__(
        self,
        objective: nn.Module,
        precision: MixedPrecision,
        context: Context,
        forward_waits: bool,
        compiled: bool = False,
    ) -> None:
        """forward_waits: a forward waits for other workers, so one that failed in it cannot ask them to retry."""
        self.parts = 1  # of every batch
        self._objective, self._precision, self._context = objective, precision, context
        self._forward = torch.compile(objective) if compiled else objective
        self._hooks = step_hooks(objective)
        self._alone = context.world_size == 1
        self._retries = self._alone or not forward_waits
        self._asks_left = 0 if self._alone or context.device.type == "cpu" or forward_waits else _AGREED_STEPS

    def __call__(self, micro: list[Batch], weight: Tensor) -> Tensor:
        """Compute gradients of the mean loss over `weight` (), the sum of weights over all workers.

        Returns (1,), this worker's weighted sum of losses. Raises torch.OutOfMemoryError if a single row is too large.
        """
        while True:
            agrees = self._asks_left > 0
            total, error = self._gradients(micro, weight, exchange=not agrees)
            if not self._any_failed(error is not None, agrees):
                if agrees:
                    self._asks_left -= 1
                    self._exchange(micro[0], weight)
                return total
            if all(batch.num_rows <= self.parts for batch in micro):
                raise error or torch.OutOfMemoryError("another worker ran out of memory with a single row")
            del error  # its traceback holds the activations of the failed step
            self._split(micro)

    def _gradients(
        self, micro: list[Batch], weight: Tensor, exchange: bool
    ) -> tuple[Tensor, torch.OutOfMemoryError | None]:
        """The sum of losses, and the error if memory ran out and the step can be retried."""
        batches = [part for batch in micro for part in batch.split(self.parts)]
        total = torch.zeros(1, device=self._context.device)
        try:
            for at, batch in enumerate(batches):
                with self._exchanging(exchange and at == len(batches) - 1):
                    total += self._backward(batch, weight)
        except torch.OutOfMemoryError as error:
            if self._alone or (self._retries and not exchange):
                return total, error
            raise
        return total, None

    def _backward(self, batch: Batch, weight: Tensor) -> Tensor:
        with self._precision.autocast():
            loss, _ = self._forward(batch)
        # DDP and FSDP average gradients over workers: world_size over the global weight makes that the global mean.
        self._precision.scaler.scale(loss * (self._context.world_size / weight)).backward()
        detached: Tensor = loss.detach()
        return detached

    def _exchange(self, like: Batch, weight: Tensor) -> None:
        """Sum the accumulated gradients over workers, in the backward of a row of weight 0."""
        gpus = [self._context.device] if self._context.device.type == "cuda" else []
        with torch.random.fork_rng(gpus):  # its dropout must not shift the random numbers of training
            self._backward(padding_like(like).to(self._context.device), weight)

    def _any_failed(self, here: bool, agrees: bool) -> bool:
        """Whether any worker ran out of memory."""
        if not agrees:
            return here
        return bool(self._context.sum(torch.tensor([float(here)], device=self._context.device)) > 0)

    def _split(self, micro: list[Batch]) -> None:
        """Twice as many parts from now on; drop what the failed step left."""
        self.parts *= 2
        for parameter in self._objective.parameters():
            parameter.grad = None
        for hook in self._hooks:
            hook.discard()
        if self._context.device.type == "cuda":
            torch.cuda.empty_cache()
        if self._context.rank == 0:
            rows = max(batch.num_rows for batch in micro)
            log.warning(
                "train",
                f"out of memory with {rows:,} rows at a time: batches are split into {self.parts} parts, the global batch "
                f"stays the same; set training.accumulation_steps = {self.parts} to start that way",
                event="out_of_memory",
                values={"rows": rows, "parts": self.parts},
            )

    def _exchanging(self, on: bool) -> contextlib.AbstractContextManager[Any]:
        """DDP sums gradients in the backward of the last part only: one exchange per step."""
        if isinstance(self._objective, nn.parallel.DistributedDataParallel) and not on:
            return self._objective.no_sync()
        return contextlib.nullcontext()
