"""Run a stage where its hardware is: on a cluster as one task next to a GPU, elsewhere in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from recray import log
from recray.cluster import resources, runtime
from recray.cluster.errors import unwrapped
from recray.config import ScalingConfig

R = TypeVar("R")


def on_cluster(stage: str, scaling: ScalingConfig, work: Callable[..., R], *arguments: Any) -> R:
    """`work(*arguments)`, which is a function of a module and gets and returns what can be pickled.

    On a cluster of several nodes it runs as a task with the resources of one training worker, so that the driver's node, often
    the head, need have no GPU and little memory. The task starts again on another node if its node is lost.
    scaling.num_workers = 0 keeps it in this process.
    """
    if not (runtime.is_shared() and scaling.num_workers):
        return work(*arguments)
    import ray

    runtime.connect()
    wanted = resources.of_worker(scaling)
    nodes = resources.of_nodes()
    alone = len(nodes) == 1 and resources.fits(wanted, nodes) > 0  # the driver's node has the same hardware
    if alone or ray.get_runtime_context().get_task_id() is not None:  # or this is a task already
        return work(*arguments)
    resources.wait([wanted], scaling.wait_seconds)
    task = ray.remote(_work).options(
        num_cpus=wanted["CPU"],
        num_gpus=wanted.get("GPU", 0),
        max_retries=scaling.max_failures,
        name=f"recray {stage}",
    )
    made = task.remote(stage, log.setting(), work, arguments)
    try:
        with unwrapped():
            return ray.get(made)  # type: ignore[no-any-return]
    except BaseException:
        ray.cancel(made, recursive=True)  # a stage that is stopped leaves no task behind
        raise


def _work(stage: str, logging: str, work: Callable[..., R], arguments: tuple[Any, ...]) -> R:
    import ray

    log.configure_worker(logging)
    context = ray.get_runtime_context()
    node, devices = context.get_node_id(), context.get_accelerator_ids().get("GPU", [])
    values = {"node": node, "gpus": devices}
    log.info(stage, f"runs on node {node[:8]}{' with a GPU' if devices else ''}", event="placed", values=values)
    return work(*arguments)
