"""The only use of private parts of Ray, for what its public API does not offer.

Every use has a guard. With a Ray version that lacks one of these names recray works, less comfortably: it waits for
resources up to `scaling.wait_seconds` instead of refusing them, leaves it to Ray to find a cluster, logs more, or listens
on all interfaces of a machine that trains alone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import socket
from collections.abc import Iterator
from typing import Any

from recray import log

_LOOPBACK = "127.0.0.1"


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


def draining_nodes() -> set[str]:
    """Ids of nodes that a notice says will be taken away soon: of a spot market, or of an autoscaler that scales down.

    Ray Train's `get_preemption_info` has to be called by all workers in every step, and tells no more than this. Empty where
    Ray's version does not tell.
    """
    try:
        from ray._private.state import state

        return set(state.get_draining_nodes())
    except Exception as error:  # also what Ray raises for a connection by ray://
        log.debug("cluster", f"this Ray does not tell which nodes are being drained: {error!r}")
        return set()


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


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Make a Ray that is started in this block listen on 127.0.0.1 only.

    Ray's processes do so if the address of their node is 127.0.0.1. On Linux `ray.init` replaces this address by that of
    a network interface, even where the caller gives it; this constant, which is false on macOS and Windows, prevents it.
    """
    try:
        from ray._private import ray_constants

        before = ray_constants.ENABLE_RAY_CLUSTER
    except (ImportError, AttributeError):
        log.warning("cluster", "this version of Ray does not tell how to listen on loopback only: see SECURITY.md")
        yield
        return
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def keep_store_on_loopback(trainer: Any) -> None:
    """Make torch's store of a TorchTrainer listen on 127.0.0.1 only, where Ray does.

    torch.distributed.TCPStore has no authentication and listens on all interfaces, unless it is given a socket.
    """
    import ray.util

    given = getattr(trainer, "backend_config", None)
    backend = getattr(given, "backend_cls", None)
    if backend is None or ray.util.get_node_ip_address() != _LOOPBACK:
        return

    def on_start(self: Any, worker_group: Any, config: Any) -> None:
        worker_group.execute(_bind_store_to_loopback)
        backend.on_start(self, worker_group, config)

    bound = type("LoopbackBackend", (backend,), {"on_start": on_start})
    kind = type("LoopbackConfig", (type(given),), {"backend_cls": property(lambda self: bound)})
    trainer.backend_config = kind(**vars(given))


def _bind_store_to_loopback() -> None:
    """In a training worker: give the store that Ray Train is about to make a socket on 127.0.0.1."""
    rendezvous = importlib.import_module("torch.distributed.rendezvous")  # not public

    made = getattr(rendezvous, "TCPStore", None)
    if made is None:
        return

    def store(*given: Any, **options: Any) -> Any:
        if options.get("is_master") and options.get("host_name") == _LOOPBACK and "master_listen_fd" not in options:
            listener = socket.create_server((_LOOPBACK, options["port"]), backlog=2048)
            options["master_listen_fd"] = listener.detach()
        return made(*given, **options)

    setattr(rendezvous, "TCPStore", store)  # noqa: B010 - mypy knows no attributes of a module
