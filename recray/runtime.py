"""The only `ray.init`: join the cluster that is there, or start a local Ray."""

from __future__ import annotations

import logging
import os

from recray.config import ScalingConfig
from recray.errors import ResourceError


def start(scaling: ScalingConfig) -> None:
    """Make sure that Ray runs and has what `scaling` asks for. Safe to call again.

    Raises ResourceError when a GPU is asked for and none is there.
    """
    # These only quieten Ray: one line a message, no progress bars, no warnings about what nobody asked for.
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    import ray

    if not ray.is_initialized():
        if os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=True, logging_level=logging.WARNING)
        else:
            # Data tasks need a CPU beside the training workers, or reading would wait for training for ever.
            wanted = max(os.cpu_count() or 1, scaling.num_workers * scaling.cpus_per_worker + 2)
            # Without a dashboard, Ray Train's cleaner warns every few seconds that it cannot ask it; only errors are shown.
            ray.init(
                num_cpus=wanted,
                include_dashboard=False,
                logging_level=logging.ERROR,
                logging_config=ray.LoggingConfig(log_level="ERROR"),
            )
    if scaling.use_gpu and scaling.num_workers and ray.cluster_resources().get("GPU", 0) < 1:
        raise ResourceError(
            "scaling.use_gpu = true, but this Ray cluster has no GPU: set scaling.use_gpu = false, "
            "or run where `nvidia-smi` and torch.cuda.is_available() find one"
        )
    quieten_data()


def quieten_data() -> None:
    """Ray Data without progress bars and chatter, for this process."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    context.enable_operator_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
