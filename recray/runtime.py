"""The only `ray.init`: join the cluster that is there, or start a local Ray."""

from __future__ import annotations

import logging
import os

from recray.config import ScalingConfig
from recray.errors import ResourceError

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
    """Make sure that Ray runs and has what `scaling` asks for. Safe to call again.

    `tasks`: work for Ray's own processes follows at once, so a local Ray starts some ahead; training's are others.

    Raises ResourceError when the training workers ask for more GPUs than this Ray has.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    global _own
    import ray

    if not ray.is_initialized():
        if os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=True, logging_level=logging.WARNING)
        else:
            # Data tasks need a CPU beside the training workers, or reading would wait for training for ever.
            wanted = max(os.cpu_count() or 1, scaling.num_workers * scaling.cpus_per_worker + 2)
            if not tasks:
                os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
            ray.init(
                num_cpus=wanted,
                include_dashboard=False,
                logging_level=logging.ERROR,
                logging_config=ray.LoggingConfig(log_level="ERROR"),
            )
            _own = True
    _check(scaling, ray.cluster_resources())
    if tasks:
        quieten_data()


def is_own() -> bool:
    """Whether this process started the Ray that runs: on one machine, for nobody else."""
    return _own


def _check(scaling: ScalingConfig, there: dict[str, float]) -> None:
    """Ray would wait for ever, in silence, for what is not there."""
    if not scaling.num_workers:
        return
    gpus = int(there.get("GPU", 0))
    if scaling.use_gpu and not gpus:
        raise ResourceError(
            "scaling.use_gpu = true, but this Ray cluster has no GPU: set scaling.use_gpu = false, "
            "or run where `nvidia-smi` and torch.cuda.is_available() find one"
        )
    if scaling.use_gpu and scaling.num_workers > gpus:
        raise ResourceError(
            f"scaling.num_workers = {scaling.num_workers} with one GPU each, but this Ray cluster has {gpus}: "
            f"set scaling.num_workers to {gpus} or fewer, or add nodes"
        )
    cpus, wanted = int(there.get("CPU", 0)), scaling.num_workers * scaling.cpus_per_worker
    if wanted > cpus:
        raise ResourceError(
            f"scaling.num_workers ({scaling.num_workers}) x scaling.cpus_per_worker ({scaling.cpus_per_worker}) "
            f"= {wanted} CPUs, but this Ray cluster has {cpus}: lower one of them, or add nodes"
        )


def quieten_data() -> None:
    """Ray Data without progress bars and chatter, for this process."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    context.enable_operator_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
