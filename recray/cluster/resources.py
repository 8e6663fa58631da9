"""What a run asks of a Ray cluster, whether the cluster can ever have it, and waiting until it is there.

Ray itself would wait in silence, for ever, for what is not there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from recray.config import ScalingConfig
from recray.errors import ResourceError

_GIB = 2**30
_ASK_EVERY = 30.0  # seconds between two lines while waiting


def of_worker(scaling: ScalingConfig) -> dict[str, float]:
    """What one training worker holds."""
    return {"CPU": float(scaling.cpus_per_worker)} | ({"GPU": 1.0} if scaling.use_gpu else {})


def check(scaling: ScalingConfig) -> None:
    """Raise ResourceError where the workers can never be placed; a cluster that adds nodes itself may yet have room."""
    nodes = _nodes()
    if fits(of_worker(scaling), nodes) < scaling.num_workers and not autoscales():
        raise ResourceError(_explain(scaling, nodes))


def wait_for_workers(scaling: ScalingConfig) -> None:
    """Print the plan, then return once all workers can be placed at once. Raises ResourceError after `wait_seconds`."""
    wanted = of_worker(scaling)
    nodes = _nodes()
    each = " and ".join(f"{amount:g} {name}" for name, amount in reversed(wanted.items()))
    workers = "1 training worker" if scaling.num_workers == 1 else f"{scaling.num_workers} training workers"
    left = max(0.0, _sum(nodes, "CPU") - scaling.num_workers * wanted["CPU"])
    print(
        f"plan: {workers} with {each} each; {left:g} CPU left for data; object store "
        f"{_sum(nodes, 'object_store_memory') / _GIB:.1f} GiB on {len(nodes)} node{'s' if len(nodes) > 1 else ''}",
        flush=True,
    )
    wait([wanted] * scaling.num_workers, scaling.wait_seconds)


def wait_for_data(scaling: ScalingConfig) -> None:
    """A cluster that starts from nothing has no CPU for the first task yet."""
    if not _sum(_nodes(), "CPU"):
        if not autoscales():
            raise ResourceError(
                "this Ray cluster has no CPU, and data tasks need one: add a node, or `ray start --num-cpus`"
            )
        wait([{"CPU": 1.0}], scaling.wait_seconds)


def wait(bundles: Sequence[dict[str, float]], seconds: float) -> None:
    """Until a placement group of `bundles` is placed; a pending one is also what tells the autoscaler to add nodes."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group(list(bundles))
    started = time.monotonic()
    told, passed = False, 0.0
    try:
        while not group.wait(min(_ASK_EVERY if told else 1.0, max(1.0, seconds - passed))):
            passed = time.monotonic() - started
            lacking = short(bundles, ray.available_resources())
            if passed >= seconds:
                raise ResourceError(
                    f"{lacking} is short after {passed:.0f} s (scaling.wait_seconds = {seconds:g}): look at `ray status` for "
                    f"why no node comes, ask for less in [scaling], or wait longer"
                )
            why = "the autoscaler adds nodes" if autoscales() else "other work holds it"
            print(
                f"waiting for {lacking}: {why}; {passed:.0f} of at most {seconds:g} s (scaling.wait_seconds)",
                flush=True,
            )
            told = True
        if told:
            print(f"all there after {time.monotonic() - started:.0f} s", flush=True)
    finally:
        remove_placement_group(group)


def short(bundles: Sequence[Mapping[str, float]], free: Mapping[str, float]) -> str:
    """'1 GPU, 2 CPU': what `bundles` want beyond what is free; what one of them wants where only the pieces are too small."""
    names = {name: None for bundle in bundles for name in bundle}
    lacking = {name: sum(bundle.get(name, 0.0) for bundle in bundles) - free.get(name, 0.0) for name in names}
    parts = [f"{amount:g} {name}" for name, amount in lacking.items() if amount > 0]
    return ", ".join(parts) or "a node with " + ", ".join(f"{amount:g} {name}" for name, amount in bundles[0].items())


def fits(bundle: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> int:
    """How many of equal bundles fit on the nodes."""
    return sum(int(min(node.get(name, 0.0) // amount for name, amount in bundle.items())) for node in nodes)


def autoscales() -> bool:
    """Whether this cluster starts nodes by itself.

    Every head without `--no-monitor` runs an autoscaler, one that can start nothing where the cluster has no file. The old
    autoscaler then names a node's type after the node; with the new one only nodes of a type have the label.
    """
    import ray
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get

    if is_autoscaler_v2():
        return any("ray.io/node-group" in (node.get("Labels") or {}) for node in ray.nodes() if node["Alive"])
    status = _internal_kv_get(b"__autoscaling_status")
    types = (json.loads(status)["autoscaler_report"].get("node_type_mapping") or {}) if status else {}
    return any(kind != f"node_{node}" for node, kind in types.items())


def _nodes() -> list[dict[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _sum(nodes: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(sum(node.get(name, 0.0) for node in nodes))


def _explain(scaling: ScalingConfig, nodes: Sequence[Mapping[str, float]]) -> str:
    gpus, cpus = int(_sum(nodes, "GPU")), int(_sum(nodes, "CPU"))
    wanted = scaling.num_workers * scaling.cpus_per_worker
    if scaling.use_gpu and not gpus:
        return (
            "scaling.use_gpu = true, but this Ray cluster has no GPU: set scaling.use_gpu = false, "
            "or run where `nvidia-smi` and torch.cuda.is_available() find one"
        )
    if scaling.use_gpu and scaling.num_workers > gpus:
        return (
            f"scaling.num_workers = {scaling.num_workers} with one GPU each, but this Ray cluster has {gpus}: "
            f"set scaling.num_workers to {gpus} or fewer, or add nodes"
        )
    if wanted > cpus:
        return (
            f"scaling.num_workers ({scaling.num_workers}) x scaling.cpus_per_worker ({scaling.cpus_per_worker}) "
            f"= {wanted} CPUs, but this Ray cluster has {cpus}: lower one of them, or add nodes"
        )
    fit = fits(of_worker(scaling), nodes)
    return (
        f"scaling.num_workers = {scaling.num_workers} with {scaling.cpus_per_worker} CPUs each, but only {fit} of them fit on "
        f"the {len(nodes)} nodes, since a worker does not span nodes: lower scaling.cpus_per_worker, or add larger nodes"
    )
