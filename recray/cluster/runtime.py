"""The only `ray.init`: join the cluster that RAY_ADDRESS names, or start a private Ray on this machine."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from recray import credentials, log, registry
from recray.cluster import cpus, private_ray, resources
from recray.cluster.guard import Guard
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
    # A worker that does not answer does not answer at its end either.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "10",
    # How soon the driver sees that training has finished.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # On a busy machine a worker process may take longer than Ray's default of 60 s to start, and would be killed.
    "RAY_worker_register_timeout_seconds": "300",
}
_CONNECT_SECONDS = 6.0  # for all of it: resolving the name, connecting, and the head's answer
_CLIENT_PORT = 10001  # the port of ray:// addresses that name none
_CHECK = "check the address, and that the cluster is up (`ray status` on its head node)"
# Of HTTP/2, which gRPC speaks: what a client says first, and the type of the frame that a server answers with.
_PREFACE, _SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)), 4
_STARTS = 3  # Ray gives its processes a fixed 30 s to start, which a busy machine may exceed
_SOCKET_PATH = 107  # bytes, a limit of Linux; below it Ray needs a session's folder and a socket's name
_SESSION = len("/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")

_own = False
_guard: Guard | None = None


def start(scaling: ScalingConfig, tasks: bool = True, again: bool = False) -> None:
    """Connect to Ray and check that it can provide what `scaling` asks for. Later calls reuse the connection.

    `tasks`: Ray tasks follow at once, so a local Ray starts worker processes ahead. Training does not use those.
    `again`: the cluster has provided it before. A node that it has lost may come back, so it is not refused.

    Raises ResourceError when the training workers need more than this cluster can ever have, ClusterError when Ray
    cannot be joined or started.
    """
    if not tasks:
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # Data tasks need CPUs in addition to those of the training workers; without them reading and training deadlock.
    connect(max(cpus.available(), scaling.num_workers * scaling.cpus_per_worker + 2))
    if scaling.num_workers and not again:
        resources.check(scaling)
    if tasks:
        resources.wait_for_data(scaling)
        quieten_data()


def connect(num_cpus: int | None = None) -> None:
    """Join the cluster that RAY_ADDRESS names, or start a local Ray with `num_cpus`. Raises ClusterError."""
    address = os.environ.get("RAY_ADDRESS") or "local"
    _set_defaults(address)
    loaded = sys.modules.get("ray")  # importing it takes seconds: first look whether it can connect
    if loaded is None or not loaded.is_initialized():
        check()
    import ray

    registry.pickle_by_value()
    if ray.is_initialized():
        return
    with _own_handlers():
        if address == "local":
            _start_local(num_cpus)
        else:
            _join(address)


@contextlib.contextmanager
def _own_handlers() -> Iterator[None]:
    """Keep the program's handler of SIGTERM, if it has one. Ray's ends Ray's processes first, at which its client aborts."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def check() -> None:
    """Raise ClusterError, within seconds and before Ray is loaded, if `connect` can only fail.

    That is if the cluster that RAY_ADDRESS names does not answer, or if this machine's folder of temporary files is too
    deep for the sockets of a local Ray.
    """
    address = os.environ.get("RAY_ADDRESS") or "local"
    _set_defaults(address)
    credentials.refuse(f"//{address.rpartition('//')[2]}", "RAY_ADDRESS")
    if address == "local":
        _check_socket_path()
        return
    try:
        _check_reachable(address)
    except OSError as error:
        raise ClusterError(f"cannot join a Ray cluster at RAY_ADDRESS = {address} ({error}): {_CHECK}") from error


def _set_defaults(address: str) -> None:
    # Joining: an attempt takes Ray 40 s, and its default of 20 attempts 14 minutes. A local start polls, so it keeps 20.
    joining = {} if address == "local" else {"RAY_NUM_REDIS_GET_RETRIES": "2"}
    for name, value in (_DEFAULTS | joining).items():
        os.environ.setdefault(name, value)


def _check_socket_path() -> None:
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder = os.environ.get(name, "/tmp").rstrip("/")  # nosec B108 - only the length of Ray's own path is checked
    if sys.platform.startswith("linux") and len(os.fsencode(folder)) + _SESSION > _SOCKET_PATH:
        raise ClusterError(
            f"{name} = {folder} is too long for the sockets of a local Ray, whose paths have at most {_SOCKET_PATH} bytes: set "
            f"RAY_TMPDIR to a folder of at most {_SOCKET_PATH - _SESSION} bytes, for example RAY_TMPDIR=/tmp"
        )


def _start_local(num_cpus: int | None) -> None:
    global _own, _guard
    import ray

    _guard = Guard()

    for name, value in loopback().items():
        os.environ.setdefault(name, value)
    for left in reversed(range(_STARTS)):
        try:
            with private_ray.on_loopback():
                ray.init(
                    address="local",  # without it Ray may join another user's cluster on this machine, and reject num_cpus
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    logging_level=logging.ERROR,
                    logging_config=ray.LoggingConfig(log_level="ERROR"),
                )
            break
        except Exception as error:  # Ray raises a bare Exception when its processes do not start in time
            ray.shutdown()
            if left and "timed out" in str(error):
                log.info("cluster", "Ray is slow to start on this machine: trying again", event="slow_start")
                continue
            raise ClusterError(
                f"Ray did not start on this machine: {error} The machine is probably overloaded, or its disk or memory is "
                "full: try again when it is less busy, or set scaling.num_workers = 0 to train without Ray"
            ) from error
    _guard.watch(ray.get_runtime_context().get_session_name())
    _own = True


def loopback() -> dict[str, str]:
    """Environment variables that keep collectives between processes of one machine on loopback."""
    name = "lo0" if sys.platform == "darwin" else "lo"
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}


def _join(address: str) -> None:
    import ray

    try:
        with _without_stderr():
            ray.init(log_to_driver=True, logging_level=logging.WARNING, runtime_env=_environment())
    except (OSError, RuntimeError, ValueError) as error:
        reason, traceback, frames = str(error.__cause__ or error).partition("Traceback")
        reason += frames.strip().rpartition("\n")[2] if traceback else ""
        advice = _CHECK
        if "InvalidAuthToken" in reason:
            advice = "the token is not the cluster's: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to it, with RAY_AUTH_MODE=token"
        raise ClusterError(f"cannot join a Ray cluster at RAY_ADDRESS = {address} ({reason}): {advice}") from error


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Ray's C++ code logs every attempt to connect. What it has to say is in the exception that it raises."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _environment() -> dict[str, Any] | None:
    """Environment variables for workers on other machines. In a Ray job those that the job sets are there already, and
    Ray refuses to set them twice."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env") or {}
    variables = {name: value for name, value in cpus.waiting().items() if name not in job.get("env_vars", {})}
    return {"env_vars": variables} if variables else None


def _check_reachable(address: str) -> None:
    """Connect to the head node and say hello, which fails at once where Ray would retry for minutes.

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
    within_seconds(partial(_say_hello, parts.hostname, port), f"{parts.hostname}:{port}")


def _say_hello(host: str, port: int) -> None:
    """Raise OSError if nothing, or nothing that speaks HTTP/2, listens there."""
    with socket.create_connection((host, port), timeout=_CONNECT_SECONDS) as connection:
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return
        connection.sendall(_PREFACE)
        answer = connection.recv(4)
    if len(answer) < 4 or answer[3] != _SETTINGS:
        raise ConnectionError(f"what listens at {host}:{port} is no head node of Ray")


def within_seconds(ask: Callable[[], None], where: str) -> None:
    """Call `ask`, which raises if there is no answer. Raises TimeoutError after a few seconds, whatever takes them:
    resolving a name knows no timeout, and a name may have several addresses."""
    failed: list[Exception] = []

    def call() -> None:
        try:
            ask()
        except Exception as error:
            failed.append(error)

    asking = threading.Thread(target=call, daemon=True)
    asking.start()
    asking.join(_CONNECT_SECONDS)
    if failed and not isinstance(failed[0], TimeoutError):
        raise failed[0]
    if failed or asking.is_alive():
        raise TimeoutError(f"{where} does not answer within {_CONNECT_SECONDS:g} s")


def is_own() -> bool:
    """True if this process started a private local Ray."""
    return _own


def stop_own() -> None:
    """Shut down the local Ray that this process started, if it did: idle, it still takes memory and a share of the CPUs."""
    global _own
    if _own:
        import ray

        ray.shutdown()
        if _guard is not None:
            _guard.release()
        _own = False


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
