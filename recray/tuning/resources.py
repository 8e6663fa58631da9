"""How many trials run side by side. Arithmetic, so that none waits for ever for what the others hold."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from recray.config import Config

Node = dict[str, float]  # "CPU", "GPU"


@dataclass(frozen=True)
class Share:
    """What the process of one trial holds, and how many trials run at a time."""

    cpus: int
    gpus: float
    concurrent: int


def local_node(config: Config) -> Node:
    """What a Ray that recray starts on this machine will have (recray.cluster.runtime)."""
    cpus, gpus = os.cpu_count() or 1, 0
    if config.scaling.use_gpu:
        import torch

        gpus = torch.cuda.device_count()
    if config.scaling.num_workers > 1:
        cpus = max(cpus, config.scaling.num_workers * config.scaling.cpus_per_worker + 2)
    return {"CPU": float(cpus), "GPU": float(gpus)}


def share(config: Config, nodes: list[Node]) -> tuple[Share, list[str]]:
    """The share of a trial, and what is wrong with it."""
    fit, wrong = (_nested if config.scaling.num_workers > 1 else _single)(config, nodes)
    concurrent = config.tune.concurrent or max(fit.concurrent, 1)
    if not wrong and concurrent > fit.concurrent:
        wrong.append(
            f"tune.concurrent = {concurrent}, but {fit.concurrent} such trials fit here: lower it, or add nodes"
        )
    return Share(fit.cpus, fit.gpus, concurrent), wrong


def _single(config: Config, nodes: list[Node]) -> tuple[Share, list[str]]:
    """A trial of one worker trains in its own process, on one node."""
    tune, wrong = config.tune, []
    cpus = tune.cpus_per_trial or config.scaling.cpus_per_worker
    name = "tune.cpus_per_trial" if tune.cpus_per_trial else "scaling.cpus_per_worker"
    gpus = (tune.gpus_per_trial or 1.0) if config.scaling.use_gpu else 0.0
    if tune.gpus_per_trial and not config.scaling.use_gpu:
        wrong.append("tune.gpus_per_trial is set, but trials use none: set scaling.use_gpu = true")
    elif gpus > 1:
        wrong.append(f"tune.gpus_per_trial = {gpus:g}: a trial of one worker uses one GPU or a part of one, 1 at most")
    most, most_gpus = (max(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    if cpus > most:
        where = "this machine has" if len(nodes) == 1 else "the largest node has"
        wrong.append(
            f"a trial needs {cpus} CPUs ({name}), but {where} {most:g}: set it to {most:g} or fewer, or add nodes"
        )
    if gpus and most_gpus < 1:
        wrong.append("a trial needs a GPU (scaling.use_gpu = true), but there is none: set scaling.use_gpu = false")
    fit = 0
    for node in nodes:
        side_by_side = math.floor(node.get("CPU", 0.0) / cpus)
        if gpus:
            side_by_side = min(side_by_side, int(node.get("GPU", 0.0)) * math.floor(1 / gpus + 1e-9))
        fit += side_by_side
    return Share(cpus, gpus, fit), wrong


def _nested(config: Config, nodes: list[Node]) -> tuple[Share, list[str]]:
    """A trial of several workers: its own process holds a CPU while they train, and one CPU is left for reading."""
    scaling, wrong = config.scaling, []
    for key in ("cpus_per_trial", "gpus_per_trial"):
        if getattr(config.tune, key):
            wrong.append(
                f"tune.{key} is for trials of one worker, and scaling.num_workers = {scaling.num_workers}: leave it out"
            )
    needs = scaling.num_workers * scaling.cpus_per_worker + 1
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    fit = math.floor((cpus - 1) / needs)
    if fit < 1:
        wrong.append(
            f"a trial needs scaling.num_workers ({scaling.num_workers}) x scaling.cpus_per_worker ({scaling.cpus_per_worker}) + 1 for "
            f"its own process + 1 for reading = {needs + 1} CPUs, but there are {cpus:g}: lower one of them, or add nodes"
        )
    if scaling.use_gpu:
        fit = min(fit, math.floor(gpus / scaling.num_workers))
        if gpus < scaling.num_workers:
            wrong.append(
                f"a trial needs {scaling.num_workers} GPUs (scaling.num_workers), but there are {gpus:g}: lower it, or add nodes"
            )
    return Share(1, 0.0, fit), wrong
