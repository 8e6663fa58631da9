"""What a module does at the end of a training step, without the training loop knowing the module.

A step of several micro-batches ends with one last backward. Before the optimizer updates the weights, some modules
must act: an embedding table exchanges the gradients of its rows, Dice moves its running averages. Such a module
implements `StepHook`. The trainer finds the hooks by walking the model, so a model of your own needs no registration:

    class RunningMean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(1))
            self.register_buffer("seen", torch.zeros(2, dtype=torch.float64), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.seen += torch.stack([x.detach().double().sum(), x.new_tensor(x.numel()).double()])
            return x - self.mean

        def after_backward(self, scaled: bool) -> Tensor:
            return self.seen                                # of this worker

        def after_sum(self, total: Tensor) -> None:         # of all workers
            self.mean.lerp_((total[0] / total[1]).float(), 0.1)
            self.seen.zero_()

        def discard(self) -> None:
            self.seen.zero_()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class StepHook(Protocol):
    """A module with work to do between the last backward of a step and the optimizer's update."""

    def after_backward(self, scaled: bool) -> Tensor:
        """Called on every worker after the last backward of a step.

        scaled: a GradScaler multiplied the loss, and checks gradients for overflows.

        Returns (n,) float64, what `after_sum` needs summed over workers; n is the same on all workers and may be 0.
        """
        ...

    def after_sum(self, total: Tensor) -> None:
        """`total` (n,): the sum over workers of what `after_backward` returned. Not called where n is 0."""
        ...

    def discard(self) -> None:
        """Drop what the forward and backward of this step collected: the step starts again with smaller batches."""
        ...


def step_hooks(model: nn.Module) -> list[StepHook]:
    """The hooks of a model, in the order of its modules, which is the same on all workers."""
    return [module for module in model.modules() if isinstance(module, StepHook)]


@torch.no_grad()
def run_hooks(hooks: Sequence[StepHook], sum_over_workers: Callable[[Tensor], Tensor], scaled: bool) -> None:
    """End a step. The sums of all hooks share one all-reduce: with several small ones a step would wait several times."""
    collected = [(hook, part) for hook in hooks if len(part := hook.after_backward(scaled))]
    if collected:
        parts = [part for _, part in collected]
        total = sum_over_workers(torch.cat(parts))
        for (hook, _), part in zip(collected, torch.split(total, [len(part) for part in parts]), strict=True):
            hook.after_sum(part)
