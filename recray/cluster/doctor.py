"""`recray doctor --env`: what every machine of this run has, and what does not fit."""

from __future__ import annotations

import os
import platform
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape

from recray.cluster import environment, runtime
from recray.cluster.environment import Finding

_SAME = ("python", "recray", "torch", "ray", "pyarrow", "numpy", "cuda", "nccl")  # on all nodes of a cluster
_SECONDS = 300


class Machine(NamedTuple):
    name: str
    findings: list[Finding]


def examine() -> list[Machine]:
    """This machine, and through Ray every node of the cluster that RAY_ADDRESS names, as in every other command."""
    here = Machine(f"{platform.node()} (this process)", environment.inspect())
    return [here, *_nodes(here)] if os.environ.get("RAY_ADDRESS") else [here]


def show(machines: list[Machine]) -> bool:
    """Print the findings, problems in red with what to do; whether there are none."""
    console = Console(highlight=False, soft_wrap=True)
    problems = 0
    for machine in machines:
        console.print(f"[bold]{escape(machine.name)}[/bold]")
        for name, value, problem in machine.findings:
            console.print(f"  {'[red]BAD[/red]' if problem else 'ok '}  {name:16} {escape(value)}")
            if problem:
                problems += 1
                console.print(f"       [red]{'':16} {escape(problem)}[/red]")
    count = f"{problems} problem{'s' if problems > 1 else ''}" if problems else "no problems"
    console.print(f"{len(machines)} machine{'s' if len(machines) > 1 else ''}, {count}")
    return not problems


def _nodes(here: Machine) -> list[Machine]:
    runtime.connect()
    import ray

    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: str(node["NodeID"]))
    # A task that asks for no GPU would be shown none.
    see = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}
    task = ray.remote(max_calls=1)(environment.inspect)
    asked = [task.options(num_cpus=0, runtime_env=see, **_on(node)).remote() for node in nodes]
    machines = []
    for node, reference in zip(nodes, asked, strict=True):
        name = f"{node['NodeManagerHostname']} (node {node['NodeManagerAddress']}, {_resources(node)})"
        try:
            found = ray.get(reference, timeout=_SECONDS)
        except Exception as error:
            last = str(error).strip().splitlines()[-1]
            advice = "use one image with recray on all nodes, and look at the node's log with `ray logs`"
            found = [Finding("task", "cannot run here", f"{last}: {advice}")]
        machines.append(Machine(name, [_like(one, here.findings) for one in found]))
    return [*machines, Machine("between the nodes", [_between(nodes)])] if len(nodes) > 1 else machines


def _on(node: dict[str, Any]) -> dict[str, Any]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)}


def _resources(node: dict[str, Any]) -> str:
    there = node["Resources"]
    return f"{there.get('CPU', 0):.0f} CPU, {there.get('GPU', 0):.0f} GPU"


def _like(finding: Finding, here: list[Finding]) -> Finding:
    """A version that is another one than here does not fit: what is pickled here is read there."""
    mine = {one.name: one.value for one in here}.get(finding.name, finding.value)
    if finding.problem or finding.name not in _SAME or finding.value == mine:
        return finding
    if finding.name in ("cuda", "nccl") or finding.name == "torch":
        mine, same = mine.split("+")[0], finding.value.split("+")[0]  # the head may run the CPU build of the same torch
        if finding.name != "torch" or mine == same:
            return finding
    return finding._replace(problem=f"{mine} where the run is started: use one image on all nodes")


def _between(nodes: list[dict[str, Any]]) -> Finding:
    """An all-reduce with one rank on every node: NCCL where two nodes or more have a GPU, gloo over all nodes otherwise."""
    import ray

    gpu = [node for node in nodes if node["Resources"].get("GPU", 0)]
    backend, chosen = ("nccl", gpu) if len(gpu) > 1 else ("gloo", nodes)
    see = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}
    meet, rank = ray.remote(_meeting), ray.remote(_one_rank)
    try:
        meeting = ray.get(
            meet.options(num_cpus=0, **_on(chosen[0])).remote(chosen[0]["NodeManagerAddress"]), timeout=_SECONDS
        )
        references = [
            rank.options(num_cpus=0, runtime_env=see, **_on(node)).remote(backend, number, len(chosen), meeting)
            for number, node in enumerate(chosen)
        ]
        answers: list[Finding] = ray.get(references, timeout=_SECONDS)
    except Exception as error:
        advice = "see `ray status` and the log of the job"
        return Finding(
            f"all-reduce {backend}", f"{len(chosen)} nodes", f"{str(error).strip().splitlines()[-1]}: {advice}"
        )
    return next((answer for answer in answers if answer.problem), answers[0])


def _meeting(address: str) -> str:
    """A free port of the first rank's node."""
    import socket

    with socket.socket() as probe:
        probe.bind((address, 0))
        return f"tcp://{address}:{probe.getsockname()[1]}"


def _one_rank(backend: str, rank: int, world: int, meeting: str) -> Finding:
    process = environment.start_rank(backend, rank, world, meeting, device=0)
    return environment.finish(f"all-reduce {backend}", f"{world} nodes", [process])
