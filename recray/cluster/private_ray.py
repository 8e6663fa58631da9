"""The only use of private parts of Ray, for what its public API does not offer.

Every use has a guard. With a Ray version that lacks one of these names recray works, less comfortably: it waits for
resources up to `scaling.wait_seconds` instead of refusing them, leaves it to Ray to find a cluster, or logs more.
"""

from __future__ import annotations

import json
from typing import Any

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


def drop_placement_group_cleaner(trainer: Any) -> None:
    """Make a TorchTrainer on a private local Ray start without the actor that cleans up after a driver that dies.

    The actor polls the dashboard, which a private Ray does not have: where two of them run on a machine it writes a
    traceback to the terminal. A private Ray ends with its driver, so there is nothing to clean up; and training starts
    one process sooner.
    """
    create = getattr(trainer, "_create_default_callbacks", None)
    if create is not None:
        name = "PlacementGroupCleanerCallback"
        trainer._create_default_callbacks = lambda: [one for one in create() if type(one).__name__ != name]


def keep_ctrl_c(trainer: Any) -> None:
    """Make a TorchTrainer keep the program's handler of Ctrl-C, where Ray Train would abort its workers without a save."""
    if hasattr(trainer, "_register_sigint_handler"):
        trainer._register_sigint_handler = lambda controller: None
