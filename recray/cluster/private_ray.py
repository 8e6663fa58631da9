"""The only use of Ray's private modules: two questions that its public API does not answer.

Both are asked inside a guard. A Ray version that lacks one of these names costs an early error message and nothing
else: recray then waits for resources up to `scaling.wait_seconds`, and Ray itself looks for the address.
"""

from __future__ import annotations

import json

from recray import log


def autoscales() -> bool:
    """Whether this cluster can start nodes. True where Ray's version does not tell.

    `ray status` shows the answer, but no public function returns it. Every head node runs an autoscaler unless it was
    started with `--no-monitor`, even where it has no configuration and can start nothing. So this looks at node types:
    the v2 autoscaler labels nodes that have one; the v1 autoscaler names the type of all other nodes after the node.
    """
    import ray

    try:
        from ray.autoscaler.v2.utils import is_autoscaler_v2
        from ray.experimental.internal_kv import _internal_kv_get

        if is_autoscaler_v2():
            return any("ray.io/node-group" in (node.get("Labels") or {}) for node in ray.nodes() if node["Alive"])
        status = _internal_kv_get(b"__autoscaling_status")
        types = (json.loads(status)["autoscaler_report"].get("node_type_mapping") or {}) if status else {}
        return any(kind != f"node_{node}" for node, kind in types.items())
    except (ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        log.debug("cluster", f"Ray {ray.__version__} does not tell whether this cluster autoscales: {error!r}")
        return True


def find_address() -> str | None:
    """What RAY_ADDRESS = auto stands for, as host:port. None where Ray finds none, or does not tell."""
    try:
        from ray._private.services import get_ray_address_from_environment

        return str(get_ray_address_from_environment("auto", None))
    except (ImportError, AttributeError, TypeError, ConnectionError):
        return None
