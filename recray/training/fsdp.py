"""Dense weights shared out over workers: each holds a part of every weight, of its gradient and of its optimizer state.

FSDP2 (`torch.distributed.fsdp.fully_shard`) around the whole objective: a forward brings all dense weights together, after
backward every worker has the sum of gradients for its part only. Weights are then `DTensor`s; here is all that needs to know.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from recray.errors import ConfigError

if TYPE_CHECKING:  # a third of a second that only those wait for who share out
    from torch.distributed.tensor import DTensor


def shard(module: nn.Module, outside: list[Tensor]) -> nn.Module:
    """The module with its weights shared out, but those `outside`. All workers hold the same weights before."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(module.parameters()).device.type
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    if outside and "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ConfigError(
            f"scaling.fsdp = true beside tables with touched rows needs torch 2.7, this is {torch.__version__}: update torch, set "
            f"model.embedding.mode = 'dense', or scaling.fsdp = false"
        )
    ignored = {"ignored_params": set(outside)} if outside else {}
    fully_shard(module, mesh=mesh, reshard_after_forward=False, **ignored)  # type: ignore[call-overload]
    return module


@contextlib.contextmanager
def together(objective: nn.Module) -> Iterator[None]:
    """Inside, the model can be used without its objective: every worker holds all weights. They must not be changed."""
    if not any(is_part(p) for p in objective.parameters()):
        yield
        return
    objective.unshard()  # type: ignore[operator]
    try:
        yield
    finally:
        objective.reshard()  # type: ignore[operator]


def is_part(x: Any) -> TypeGuard[DTensor]:
    return isinstance(x, Tensor) and hasattr(x, "to_local")


def local(x: Tensor) -> Tensor:
    """The part of it that is here."""
    return x.to_local() if is_part(x) else x


def whole(tree: Any) -> Any:
    """Dictionaries and lists with all of every tensor. All workers must ask together."""
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [whole(value) for value in tree]
    return tree.full_tensor() if is_part(tree) else tree


def like(x: Tensor, weight: Tensor) -> Tensor:
    """All of a tensor to how the weight lies on the workers."""
    if is_part(weight) and x.shape == weight.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(x.to(weight.device), weight.device_mesh, weight.placements)
    return x
