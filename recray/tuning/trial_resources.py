"""How many trials run at a time, from what a trial needs and what the nodes have.

Two nodes with 4 and 3 CPUs, trials of one worker with 2 CPUs: 4 // 2 + 3 // 2 = 3 at a time. It is computed here, before
Ray sees a trial: trials of several workers that each hold a part of the cluster could wait for the rest for ever.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from recray.cluster.cpus import available
from recray.config import Config

Node = dict[str, float]  # "CPU", "GPU"


@dataclass(frozen=True)
class TrialResources:
    """What the process of a trial holds, and how many trials run at a time."""

    cpus: int
    gpus: float
    concurrent: int


def local_node(config: Config) -> Node:
    """The resources of the local Ray that recray.cluster.runtime starts for this configuration."""
    cpus, gpus = available(), 0
    if config.scaling.use_gpu:
        import torch

        gpus = torch.cuda.device_count()
    if config.scaling.num_workers > 1:
        cpus = max(cpus, config.scaling.num_workers * config.scaling.cpus_per_worker + 2)
    return {"CPU": float(cpus), "GPU": float(gpus)}


def plan_resources(config: Config, nodes: list[Node]) -> tuple[TrialResources, list[str]]:
    """The resources of a trial, and a message for every problem with them."""
    most, problems = (_several_workers if config.scaling.num_workers > 1 else _one_worker)(config, nodes)
    concurrent = config.tune.concurrent or max(most.concurrent, 1)
    if not problems and concurrent > most.concurrent:
        problems.append(
            f"tune.concurrent = {concurrent}, but only {most.concurrent} such trials fit: lower it, or add nodes"
        )
    return TrialResources(most.cpus, most.gpus, concurrent), problems


def _one_worker(config: Config, nodes: list[Node]) -> tuple[TrialResources, list[str]]:
    """A trial of one worker trains in its own process, on one node."""
    tune, problems = config.tune, []
    key = "tune.cpus_per_trial" if tune.cpus_per_trial else "scaling.cpus_per_worker"
    cpus = tune.cpus_per_trial or config.scaling.cpus_per_worker
    gpus = (tune.gpus_per_trial or 1.0) if config.scaling.use_gpu else 0.0
    if tune.gpus_per_trial and not config.scaling.use_gpu:
        problems.append("tune.gpus_per_trial is set, but trials use no GPU: set scaling.use_gpu = true")
    elif gpus > 1:
        problems.append(f"tune.gpus_per_trial = {gpus:g}: a trial of one worker uses at most one GPU; set 1 or less")
    most_cpus, most_gpus = (max(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    if cpus > most_cpus:
        where = "this machine has" if len(nodes) == 1 else "the largest node has"
        problems.append(
            f"a trial needs {cpus} CPUs ({key}), but {where} {most_cpus:g}: set it to {most_cpus:g} or less, or add nodes"
        )
    if gpus and most_gpus < 1:
        problems.append("a trial needs a GPU (scaling.use_gpu = true), but there is none: set scaling.use_gpu = false")
    concurrent = 0
    for node in nodes:
        on_node = math.floor(node.get("CPU", 0.0) / cpus)
        if gpus:
            on_node = min(on_node, int(node.get("GPU", 0.0)) * math.floor(1 / gpus + 1e-9))
        concurrent += on_node
    return TrialResources(cpus, gpus, concurrent), problems


def _several_workers(config: Config, nodes: list[Node]) -> tuple[TrialResources, list[str]]:
    """Trials of several workers start them themselves; their own processes hold a CPU each, one more is for reading."""
    scaling, workers = config.scaling, config.scaling.num_workers
    problems = [
        f"tune.{key} is for trials of one worker, and scaling.num_workers = {workers}: leave it out"
        for key in ("cpus_per_trial", "gpus_per_trial")
        if getattr(config.tune, key)
    ]
    needs = workers * scaling.cpus_per_worker + 1
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    concurrent = math.floor((cpus - 1) / needs)
    if concurrent < 1:
        problems.append(
            f"a trial needs scaling.num_workers ({workers}) x scaling.cpus_per_worker ({scaling.cpus_per_worker}) + 1 for "
            f"its own process + 1 for reading = {needs + 1} CPUs, but there are {cpus:g}: lower one of them, or add nodes"
        )
    if scaling.use_gpu:
        concurrent = min(concurrent, math.floor(gpus / workers))
        if gpus < workers:
            problems.append(
                f"a trial needs {workers} GPUs (scaling.num_workers), but there are {gpus:g}: lower it, or add nodes"
            )
    return TrialResources(1, 0.0, concurrent), problems
