"""Check and wait for the CPUs and GPUs that a run needs.

Ray waits in silence, and without a limit, for resources that a cluster does not have. recray instead refuses what a
fixed cluster can never provide, and waits up to `scaling.wait_seconds` for what is busy or still to be started:

    cluster: plan: 2 training workers with 1 GPU and 4 CPUs each; 8 CPUs left for data; object store 24.0 GiB on 3 nodes
    cluster: waiting for 2 GPUs: the autoscaler is adding nodes; 1 of at most 900 s (scaling.wait_seconds)
    cluster: resources available after 214 s
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from recray import log
from recray.cluster.private_ray import autoscales
from recray.config import ScalingConfig
from recray.errors import ResourceError

_GIB = 2**30
_MESSAGE_SECONDS = 30.0  # between two messages while waiting


def of_worker(scaling: ScalingConfig) -> dict[str, float]:
    """Resources of one training worker."""
    return {"CPU": float(scaling.cpus_per_worker)} | ({"GPU": 1.0} if scaling.use_gpu else {})


def check(scaling: ScalingConfig) -> None:
    """Raise ResourceError if the workers can never be placed, neither on the current nodes nor by autoscaling."""
    nodes = of_nodes()
    if fits(of_worker(scaling), nodes) < (scaling.min_workers or scaling.num_workers) and not autoscales():
        raise ResourceError(_explain(scaling, nodes))


def wait_for_workers(scaling: ScalingConfig) -> None:
    """Log the plan and wait until all workers can be placed together. Raises ResourceError after `wait_seconds`."""
    wanted, nodes = of_worker(scaling), of_nodes()
    workers = "1 training worker" if scaling.num_workers == 1 else f"{scaling.num_workers} training workers"
    left = max(0.0, _sum(nodes, "CPU") - scaling.num_workers * wanted["CPU"])
    log.info(
        "cluster",
        f"plan: {workers} with {_each(scaling)} each; {_amount(left, 'CPU')} left for data; object store "
        f"{_sum(nodes, 'object_store_memory') / _GIB:.1f} GiB on {_nodes_text(nodes)}",
        event="plan",
        values={"workers": scaling.num_workers, "per_worker": wanted, "cpus_for_data": left, "nodes": len(nodes)},
    )
    wait([wanted] * scaling.num_workers, scaling.wait_seconds)


def wait_for_data(scaling: ScalingConfig) -> None:
    """Wait for the first CPU of a cluster that starts with no worker nodes."""
    if not _sum(of_nodes(), "CPU"):
        if not autoscales():
            raise ResourceError(
                "this Ray cluster has no CPU, and data tasks need one: add a node, or start one with `ray start --num-cpus`"
            )
        wait([{"CPU": 1.0}], scaling.wait_seconds)


def wait(bundles: Sequence[dict[str, float]], seconds: float) -> None:
    """Wait until `bundles` can be placed together. Raises ResourceError after `seconds`.

    A placement group reserves them all at once; while it is pending, it is also the request that the autoscaler sees.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group(list(bundles))
    started = time.monotonic()
    waited, passed = False, 0.0
    try:
        # The first message comes after one second: free resources need no message.
        while not group.wait(min(_MESSAGE_SECONDS if waited else 1.0, max(1.0, seconds - passed))):
            passed = time.monotonic() - started
            lacking = short(bundles, ray.available_resources())
            if passed >= seconds:
                raise ResourceError(
                    f"{lacking} not available after {passed:.0f} s (scaling.wait_seconds = {seconds:g}): see `ray status` "
                    "for what uses the cluster and why no node starts, lower [scaling], or raise scaling.wait_seconds"
                )
            why = "the autoscaler is adding nodes" if autoscales() else "in use by other jobs"
            log.info(
                "cluster",
                f"waiting for {lacking}: {why}; {passed:.0f} of at most {seconds:g} s (scaling.wait_seconds)",
                event="waiting",
                values={"missing": lacking, "seconds": passed, "limit": seconds},
            )
            waited = True
        if waited:
            passed = time.monotonic() - started
            log.info(
                "cluster", f"resources available after {passed:.0f} s", event="available", values={"seconds": passed}
            )
    finally:
        remove_placement_group(group)


def short(bundles: Sequence[Mapping[str, float]], free: Mapping[str, float]) -> str:
    """What is missing to place `bundles`: "1 GPU, 2 CPUs" if the total is too small, else the size of one bundle."""
    names = {name: None for bundle in bundles for name in bundle}
    lacking = {name: sum(bundle.get(name, 0.0) for bundle in bundles) - free.get(name, 0.0) for name in names}
    parts = [_amount(amount, name) for name, amount in lacking.items() if amount > 0]
    return ", ".join(parts) or "a node with " + ", ".join(_amount(amount, name) for name, amount in bundles[0].items())


def fits(bundle: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> int:
    """How many copies of `bundle` fit on the nodes; a copy does not span nodes."""
    return sum(int(min(node.get(name, 0.0) // amount for name, amount in bundle.items())) for node in nodes)


def _amount(amount: float, name: str) -> str:
    """2, "GPU" -> "2 GPUs"; custom resources keep their name."""
    return f"{amount:g} {name}{'s' if name in ('CPU', 'GPU') and amount != 1 else ''}"


def of_nodes() -> list[dict[str, float]]:
    """The resources of each node that is alive."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _sum(nodes: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(sum(node.get(name, 0.0) for node in nodes))


def _explain(scaling: ScalingConfig, nodes: Sequence[Mapping[str, float]]) -> str:
    gpus, cpus = _sum(nodes, "GPU"), _sum(nodes, "CPU")
    if scaling.use_gpu and not gpus:
        return (
            "scaling.use_gpu = true, but this Ray cluster has no GPU: set scaling.use_gpu = false, "
            "or run where `nvidia-smi` and torch.cuda.is_available() find one"
        )
    fit = fits(of_worker(scaling), nodes)
    return (
        f"scaling.num_workers = {scaling.num_workers} with {_each(scaling)} each, but only {fit} of them fit on this Ray "
        f"cluster ({_amount(cpus, 'CPU')}, {_amount(gpus, 'GPU')}, {_nodes_text(nodes)}; a worker does not span nodes): "
        "lower scaling.num_workers or scaling.cpus_per_worker, or add nodes"
    )


def _each(scaling: ScalingConfig) -> str:
    return " and ".join(_amount(amount, name) for name, amount in reversed(of_worker(scaling).items()))


def _nodes_text(nodes: Sequence[object]) -> str:
    return f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}"
