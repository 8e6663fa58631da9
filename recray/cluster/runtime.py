"""The only `ray.init`: join the cluster that is there, or start a local Ray."""

from __future__ import annotations

import logging
import os
import sys

from recray import registry
from recray.cluster import resources
from recray.config import ScalingConfig
from recray.errors import ClusterError

_QUIET = {  # one line a message, no progress bars, no warnings about what nobody asked for
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Its actor warns at every start; recray goes on from the last epoch on disk without it.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # How soon the end of training is seen.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}

_own = False


def start(scaling: ScalingConfig, tasks: bool = True) -> None:
    """Make sure that Ray runs and can have what `scaling` asks for. Safe to call again.

    `tasks`: work for Ray's own processes follows at once, so a local Ray starts some ahead; training's are others.

    Raises ResourceError when the training workers ask for more than this Ray can ever have.
    """
    if not tasks:
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # Data tasks need a CPU beside the training workers, or reading would wait for training for ever.
    connect(max(os.cpu_count() or 1, scaling.num_workers * scaling.cpus_per_worker + 2))
    if scaling.num_workers:
        resources.check(scaling)
    if tasks:
        resources.wait_for_data(scaling)
        quieten_data()


def connect(num_cpus: int | None = None) -> None:
    """Join the cluster that RAY_ADDRESS names; a local Ray with `num_cpus` where there is none."""
    global _own
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    registry.pickle_by_value()
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        ray.init(
            address="local",  # else Ray looks for a cluster of this machine, and takes no num_cpus where it finds one
            num_cpus=num_cpus,
            include_dashboard=False,
            logging_level=logging.ERROR,
            logging_config=ray.LoggingConfig(log_level="ERROR"),
        )
        _own = True
        return
    try:
        ray.init(log_to_driver=True, logging_level=logging.WARNING)
    except ConnectionError as error:
        reason = str(error.__cause__ or error)
        refused = (
            "the token is not the cluster's: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to it, with RAY_AUTH_MODE=token"
        )
        lost = "check the address, and that the cluster runs (`ray status`)"
        raise ClusterError(
            f"no Ray cluster can be joined at RAY_ADDRESS = {address}: {refused if 'InvalidAuthToken' in reason else lost}"
        ) from error


def is_own() -> bool:
    """Whether this process started the Ray that runs: on one machine, for nobody else."""
    return _own


def is_shared() -> bool:
    """Whether a cluster is there to be used: RAY_ADDRESS names one, or this process has joined one."""
    ray = sys.modules.get("ray")  # whoever has joined one has imported it
    return not _own and (bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and ray.is_initialized()))


def quieten_data() -> None:
    """Ray Data without progress bars and chatter, for this process."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    context.enable_operator_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
