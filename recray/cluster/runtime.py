"""The only `ray.init`: join the cluster that RAY_ADDRESS names, or start a private Ray on this machine."""

from __future__ import annotations

import logging
import os
import socket
import sys
from urllib.parse import urlsplit

from recray import registry
from recray.cluster import private_ray, resources
from recray.config import ScalingConfig
from recray.errors import ClusterError

# Ray reads these when it is imported. Values that the user has set win.
_DEFAULTS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Its actor logs a warning at every start, and recray resumes from checkpoints without it.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # How soon the driver sees that training has finished.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
_CONNECT_SECONDS = 5.0
_CLIENT_PORT = 10001  # the port of ray:// addresses that name none
_CHECK = "check the address, and that the cluster is up (`ray status` on its head node)"

_own = False


def start(scaling: ScalingConfig, tasks: bool = True) -> None:
    """Connect to Ray and check that it can provide what `scaling` asks for. Later calls reuse the connection.

    `tasks`: Ray tasks follow at once, so a local Ray starts worker processes ahead. Training does not use those.

    Raises ResourceError when the training workers need more than this cluster can ever have, ClusterError when Ray
    cannot be joined or started.
    """
    if not tasks:
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # Data tasks need CPUs in addition to those of the training workers; without them reading and training deadlock.
    connect(max(os.cpu_count() or 1, scaling.num_workers * scaling.cpus_per_worker + 2))
    if scaling.num_workers:
        resources.check(scaling)
    if tasks:
        resources.wait_for_data(scaling)
        quieten_data()


def connect(num_cpus: int | None = None) -> None:
    """Join the cluster that RAY_ADDRESS names, or start a local Ray with `num_cpus`. Raises ClusterError."""
    global _own
    address = os.environ.get("RAY_ADDRESS") or "local"
    # Joining: an attempt takes Ray 40 s, and its default of 20 attempts 14 minutes. A local start polls, so it keeps 20.
    joining = {} if address == "local" else {"RAY_NUM_REDIS_GET_RETRIES": "2"}
    for name, value in (_DEFAULTS | joining).items():
        os.environ.setdefault(name, value)
    import ray

    registry.pickle_by_value()
    if ray.is_initialized():
        return
    if address != "local":
        _join(address)
        return
    try:
        ray.init(
            address="local",  # without it Ray may join another user's cluster on this machine, and reject num_cpus
            num_cpus=num_cpus,
            include_dashboard=False,
            logging_level=logging.ERROR,
            logging_config=ray.LoggingConfig(log_level="ERROR"),
        )
    except Exception as error:  # Ray raises a bare Exception when its processes do not start in time
        ray.shutdown()
        raise ClusterError(
            f"Ray did not start on this machine: {error} The machine is probably overloaded, or its disk or memory is full: "
            "try again when it is less busy, or set scaling.num_workers = 0 to train without Ray"
        ) from error
    _own = True


def _join(address: str) -> None:
    import ray

    try:
        _check_reachable(address)
        ray.init(log_to_driver=True, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error.__cause__ or error)
        advice = _CHECK
        if "InvalidAuthToken" in reason:
            advice = "the token is not the cluster's: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to it, with RAY_AUTH_MODE=token"
        raise ClusterError(f"cannot join a Ray cluster at RAY_ADDRESS = {address} ({reason}): {advice}") from error


def _check_reachable(address: str) -> None:
    """Open a TCP connection to the head node, which fails at once where Ray would retry for minutes.

    Raises OSError when the head does not answer, ClusterError when `address` is not an address.
    """
    if address == "auto":
        found = private_ray.find_address()
        if found is None:
            return  # ray.init reports that there is no cluster
        address = found
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.scheme not in ("", "ray", "http", "https"):
        return  # an address of a Ray plug-in
    try:
        port = parts.port or (_CLIENT_PORT if parts.scheme == "ray" else None)
    except ValueError:
        port = None
    if parts.scheme in ("http", "https") or not parts.hostname or port is None:
        raise ClusterError(
            f"RAY_ADDRESS = {address} does not name a Ray cluster: use HOST:PORT of its head node (port 6379 by default), "
            "ray://HOST:PORT, `auto` for the cluster of this machine, or `local`. The address of the dashboard (port 8265) "
            "is for `recray submit --address`"
        )
    socket.create_connection((parts.hostname, port), timeout=_CONNECT_SECONDS).close()


def is_own() -> bool:
    """True if this process started a private local Ray."""
    return _own


def is_shared() -> bool:
    """True if work goes to a cluster: RAY_ADDRESS names one, or this process has joined one."""
    ray = sys.modules.get("ray")  # not imported yet means not connected
    address = os.environ.get("RAY_ADDRESS", "local")
    return not _own and (address not in ("", "local") or (ray is not None and ray.is_initialized()))


def quieten_data() -> None:
    """Turn off Ray Data's progress bars and log messages in this process."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    context.enable_operator_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
