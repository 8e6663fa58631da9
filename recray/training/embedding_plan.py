"""Inputs for choosing `model.embedding.mode`: how many rows a step uses, and how much memory a worker has."""

from __future__ import annotations

import os

import torch

from recray.config import Config
from recray.layers.embedding import Ids, TablePlan
from recray.training.distributed import Context


def table_plan(config: Config, context: Context, num_items: int) -> TablePlan:
    """The same plan on every worker: the one with the least memory decides."""
    # At most: a row's history and its target, shared negatives, and with softmax the whole catalogue.
    rows = config.training.global_batch_size // context.world_size
    items = rows * (config.model.history_length + 1)
    items += config.loss.sampled_items * config.training.accumulation_steps
    if config.loss.scores_all_items:
        items = num_items
    touched: dict[Ids, int] = {"user": rows, "item": items, "feature": items}
    mode = config.model.embedding.mode
    # Softmax and EMA need every row at every step, so that sharding would save nothing.
    may_shard = not config.loss.scores_all_items and not config.optim.ema_decay
    memory = None
    if mode == "auto" and may_shard and context.world_size > 1:
        mine = torch.tensor([_memory(context.device) / context.local_size], dtype=torch.float64, device=context.device)
        memory = int(context.all_gather(mine).min())
    return TablePlan(
        mode=mode,
        rank=context.rank,
        world_size=context.world_size,
        touched=touched,
        memory=memory,
        row_bytes=4 if config.optim.name == "sgd" or config.optim.table_optimizer == "adagrad" else 12,
    )


def _memory(device: torch.device) -> int:
    """Bytes for all workers of this machine: of its GPUs, or of the machine or container."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) * torch.cuda.device_count()
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            limit = file.read().strip()
    except OSError:  # no container, or an older kernel
        return machine
    return min(machine, int(limit)) if limit.isdigit() else machine
