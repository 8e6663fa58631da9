"""`recray doctor`: check this machine and, through Ray, every node of the cluster that RAY_ADDRESS names.

worker-1 (node 10.0.0.7, 8 CPUs, 1 GPU)
  ok   python           3.11.7
  BAD  ray              2.58.0
                        2.60.0 on the machine that starts the run: use one image on all nodes
"""

from __future__ import annotations

import platform
import socket
from typing import Any, NamedTuple

import typer

from recray.cluster import environment, runtime
from recray.cluster.environment import Finding

_SAME = ("python", "recray", "torch", "ray", "pyarrow", "numpy")  # must be equal on all nodes of a cluster
_SECONDS = 300


class Machine(NamedTuple):
    name: str
    findings: list[Finding]


def examine() -> list[Machine]:
    """Findings of this machine, of every node of the cluster, and of an all-reduce between the nodes.

    Raises ClusterError if RAY_ADDRESS is set and that cluster cannot be joined; at once where it does not answer.
    """
    if runtime.is_shared():
        runtime.connect()
    here = Machine(f"{platform.node()} (this process)", environment.inspect())
    return [here, *_nodes(here)] if runtime.is_shared() else [here]


def render(machines: list[Machine]) -> tuple[str, int]:
    """The findings as text, problems in red, and the number of problems."""
    lines = []
    problems = 0
    for machine in machines:
        lines.append(typer.style(machine.name, bold=True))
        for name, value, problem in machine.findings:
            lines.append(f"  {typer.style('BAD', fg='red') if problem else 'ok '}  {name:16} {value}")
            if problem:
                problems += 1
                lines.append(typer.style(f"       {'':16} {problem}", fg="red"))
    count = f"{problems} problem{'s' if problems > 1 else ''}" if problems else "no problems"
    lines.append(f"{len(machines)} machine{'s' if len(machines) > 1 else ''}, {count}")
    return "\n".join(lines), problems


def _nodes(here: Machine) -> list[Machine]:
    import ray

    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: str(node["NodeID"]))
    inspect = ray.remote(max_calls=1)(environment.inspect)
    references = [inspect.options(**_on(node)).remote() for node in nodes]
    machines = []
    for node, reference in zip(nodes, references, strict=True):
        cpus, gpus = (int(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU"))
        name = f"{node['NodeManagerHostname']} (node {node['NodeManagerAddress']}, {cpus} CPU, {gpus} GPU)"
        try:
            found = ray.get(reference, timeout=_SECONDS)
        except Exception as error:
            advice = "use one image with recray on all nodes, and see the node's log with `ray logs`"
            found = [Finding("task", "cannot run on this node", f"{_last_line(error)}: {advice}")]
        machines.append(Machine(name, [compare(one, here.findings) for one in found]))
    return [*machines, Machine("between the nodes", [_between(nodes)])] if len(nodes) > 1 else machines


def _on(node: dict[str, Any]) -> dict[str, Any]:
    """Options of a task that runs on this node, uses none of its resources and sees its GPUs."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {
        "num_cpus": 0,
        # Ray hides the GPUs from tasks that request none, unless this is set.
        "runtime_env": {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}},
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
    }


def compare(finding: Finding, here: list[Finding]) -> Finding:
    """Add a problem to a version that differs from the one here: objects pickled here are unpickled on the node."""
    mine = {one.name: one.value for one in here}.get(finding.name, finding.value)
    value = finding.value
    if finding.name == "torch":  # the head may have the CPU build of the same version: 2.13.0+cpu and 2.13.0+cu130
        mine, value = mine.partition("+")[0], value.partition("+")[0]
    if finding.problem or finding.name not in _SAME or value == mine:
        return finding
    return finding._replace(problem=f"{mine} on the machine that starts the run: use one image on all nodes")


def _between(nodes: list[dict[str, Any]]) -> Finding:
    """All-reduce with one rank per node: NCCL if at least two nodes have a GPU, else gloo over all nodes."""
    import ray

    with_gpu = [node for node in nodes if node["Resources"].get("GPU", 0)]
    backend, chosen = ("nccl", with_gpu) if len(with_gpu) > 1 else ("gloo", nodes)
    try:
        free_port = ray.remote(_free_port).options(**_on(chosen[0])).remote(chosen[0]["NodeManagerAddress"])
        init_method = ray.get(free_port, timeout=_SECONDS)
        all_reduce = ray.remote(environment.all_reduce)
        references = [
            all_reduce.options(**_on(node)).remote(backend, len(chosen), [rank], init_method)
            for rank, node in enumerate(chosen)
        ]
        findings: list[Finding] = ray.get(references, timeout=_SECONDS)
    except Exception as error:
        advice = "see `ray status` and the log of the job"
        return Finding(f"all-reduce {backend}", f"{len(chosen)} nodes", f"{_last_line(error)}: {advice}")
    return next((finding for finding in findings if finding.problem), findings[0])


def _free_port(address: str) -> str:
    """Run on the node of rank 0: where the ranks meet."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return f"tcp://{address}:{probe.getsockname()[1]}"


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
