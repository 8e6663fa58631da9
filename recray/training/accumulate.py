"""Forward and backward of one optimizer step, in as many parts as the accelerator's memory needs.

The global batch stays what it is: a part's loss is divided by the weight of the whole batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from recray.layers import dice, embedding
from recray.loading.batch import Batch
from recray.loading.collate import padding_like
from recray.training.distributed import Context

_TRIED = 100  # steps in which several workers ask each other whether memory was enough; later ones need no more


class Accumulation:
    """Of a worker that runs alone a batch that does not fit is split and tried again.

    Workers must agree first, for each waits for the others' gradients. So in the first steps gradients are summed
    only after all have computed theirs: in a backward of their own, over a row that weighs nothing.
    """

    def __init__(
        self,
        objective: nn.Module,
        forward: Callable[[Batch], tuple[Tensor, Tensor]],
        scaler: Any,
        dtype: torch.dtype,
        context: Context,
        together: bool,
    ) -> None:
        """`together`: the forward itself waits for other workers, so one that failed in it cannot be waited for."""
        self.parts = 1  # of every batch
        self._objective, self._forward, self._scaler, self._dtype = objective, forward, scaler, dtype
        self._context = context
        self._alone = context.world_size == 1
        self._recovers = self._alone or not together
        self._tries = 0 if self._alone or context.device.type == "cpu" or together else _TRIED

    def __call__(self, micro: list[Batch], weight: Tensor) -> Tensor:
        """(1,) this worker's sum of weighted losses; gradients are those of the mean over `weight`, of all workers."""
        while True:
            batches = [part for batch in micro for part in batch.split(self.parts)]
            asks = self._tries > 0
            total, error = torch.zeros(1, device=self._context.device), None
            try:
                for at, batch in enumerate(batches):
                    with self._synced(not asks and at == len(batches) - 1):
                        total += self._backward(batch, weight)
            except torch.OutOfMemoryError as raised:
                if not self._recovers or not (asks or self._alone):
                    raise
                error = raised
            if not self._failed(error is not None, asks):
                if asks:
                    self._tries -= 1
                    gpus = [self._context.device] if self._context.device.type == "cuda" else []
                    with torch.random.fork_rng(gpus):  # what it draws, training without it would not have drawn
                        self._backward(padding_like(micro[0]).to(self._context.device), weight)
                return total
            if all(batch.num_rows <= self.parts for batch in micro):
                raise error or torch.OutOfMemoryError("another worker ran out of memory with a single row")
            self._split(micro)

    def _backward(self, batch: Batch, weight: Tensor) -> Tensor:
        device = self._context.device
        with torch.autocast(device.type, self._dtype, enabled=self._dtype is not torch.float32):
            loss, _ = self._forward(batch)
        # DDP averages over workers: times world_size over the global weight gives the global mean.
        self._scaler.scale(loss * (self._context.world_size / weight)).backward()
        return loss.detach()

    def _failed(self, here: bool, asks: bool) -> bool:
        """Whether any worker ran out of memory."""
        if not asks:
            return here
        return bool(self._context.sum(torch.tensor([float(here)], device=self._context.device)) > 0)

    def _split(self, micro: list[Batch]) -> None:
        self.parts *= 2
        for parameter in self._objective.parameters():
            parameter.grad = None
        embedding.forget(self._objective)
        dice.forget(self._objective)
        if self._context.device.type == "cuda":
            torch.cuda.empty_cache()
        if self._context.rank == 0:
            rows = max(batch.num_rows for batch in micro)
            print(
                f"train: out of memory with {rows:,} rows at a time: batches are split into {self.parts} parts, the global batch stays "
                f"the same; training.accumulation_steps does so from the start",
                flush=True,
            )

    def _synced(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients cross workers only with the last part of a batch."""
        if isinstance(self._objective, nn.parallel.DistributedDataParallel) and not last:
            return self._objective.no_sync()
        return contextlib.nullcontext()
