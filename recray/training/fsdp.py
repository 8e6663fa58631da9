"""Dense parameters sharded with FSDP2: each worker holds a part of every weight, of its gradient and optimizer state.

`torch.distributed.fsdp.fully_shard` wraps the whole objective. A forward gathers all dense weights; after the backward
every worker has the mean of the gradients for its part. Weights are `DTensor`s then. This module is the only one
that handles them; other modules call its functions, which do nothing to plain tensors.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from recray.errors import ConfigError

if TYPE_CHECKING:  # imported lazily: costs 0.3 s, needed only with FSDP
    from torch.distributed.tensor import DTensor


def shard(module: nn.Module, outside: list[Tensor]) -> nn.Module:
    """The module with its weights sharded, except those `outside`. All workers must hold the same weights before."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(module.parameters()).device.type
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    if outside and "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ConfigError(
            f"scaling.fsdp = true with sparse_replicated or row_sharded tables needs torch >= 2.7, and this is "
            f"{torch.__version__}: use a newer one, or set model.embedding.mode = 'dense' or scaling.fsdp = false"
        )
    ignored = {"ignored_params": set(outside)} if outside else {}
    fully_shard(module, mesh=mesh, reshard_after_forward=False, **ignored)  # type: ignore[call-overload]
    return module


@contextlib.contextmanager
def gathered(objective: nn.Module) -> Iterator[None]:
    """Inside the block every worker holds all weights, so that the model can be called directly. They must not be changed."""
    if not any(is_part(p) for p in objective.parameters()):
        yield
        return
    objective.unshard()  # type: ignore[operator]
    try:
        yield
    finally:
        objective.reshard()  # type: ignore[operator]


def is_part(x: Any) -> TypeGuard[DTensor]:
    """Whether x is this worker's part of a sharded tensor."""
    return isinstance(x, Tensor) and hasattr(x, "to_local")


def local(x: Tensor) -> Tensor:
    """This worker's part of a sharded tensor; x itself if it is not sharded."""
    return x.to_local() if is_part(x) else x


def whole(tree: Any) -> Any:
    """Dictionaries and lists with every sharded tensor gathered. All workers must call it."""
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [whole(value) for value in tree]
    return tree.full_tensor() if is_part(tree) else tree


def like(x: Tensor, weight: Tensor) -> Tensor:
    """A whole tensor, sharded as `weight` is; x itself if `weight` is not sharded."""
    if is_part(weight) and x.shape == weight.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(x.to(weight.device), weight.device_mesh, weight.placements)
    return x
