"""Train on the workers of a Ray TorchTrainer, which are started again when they are lost or when their number changes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from recray import log, progress
from recray.cluster import private_ray, resources, runtime
from recray.cluster.errors import lost_worker, summary, unwrap
from recray.errors import ClusterError, Interrupted
from recray.training import elastic, interrupt, watchdog

if TYPE_CHECKING:
    from ray.train import UserCallback
    from ray.train.torch import TorchTrainer

    from recray.training.launch import Work

Loop = Callable[[dict[str, Any]], None]

_BACKOFF = (5.0, 20.0, 60.0)  # seconds before workers start again


def run(work: Work, loop: Loop, states: Callable[[], list[str]], callback: UserCallback | None) -> None:
    """Train on Ray workers, each of which runs `loop`.

    A lost worker or node ends all of them, and they start again from the last saved state.

    states: folders of the states on disk, which change when training makes progress.
    """
    failures, most, starts = 0, work.config.scaling.max_failures, 0
    watchdog.stalled(work.folder)  # of an earlier start
    while True:
        before = states()
        try:
            reason = _run_once(work, loop, callback, again=starts > 0)
            if reason is None:
                return
            starts += 1
            text = f"{reason}: training was saved, and goes on there"
            log.info("train", text, event="resize", values={"reason": reason})
        except Exception as error:
            starts += 1
            if not lost_worker(error):
                raise
            reason = watchdog.stalled(work.folder) or summary(error)
            failures = 1 if states() != before else failures + 1
            if failures > most:
                raise ClusterError(
                    f"training workers were lost {failures} times without progress, the last time by: {reason}. "
                    f"Look at the nodes and their memory; the same command resumes from the last saved state"
                ) from error
            delay = _BACKOFF[min(failures, len(_BACKOFF)) - 1]
            log.warning(
                "train",
                f"training workers were lost ({reason}): they start again from the last saved state in {delay:.0f} s "
                f"(failure {failures} of {most} without progress)",
                event="restart",
                values={"failures": failures, "seconds": delay},
            )
            time.sleep(delay)


def _run_once(work: Work, loop: Loop, callback: UserCallback | None, again: bool) -> str | None:
    """Train on workers to the end. Returns why they have saved and stopped before, if their number should change.

    again: this training had workers before.
    """
    wanted = work.config.scaling
    runtime.start(wanted, tasks=False, again=again)
    config = work.config if runtime.is_own() else elastic.wait_for_workers(work.config, again)
    trainer = _ray_trainer(replace(work, config=config), loop, callback)
    workers = config.scaling.num_workers
    title, missing = f"{workers} worker{'s' * (workers > 1)}", wanted.num_workers - workers
    with interrupt.forwarded(work.folder), elastic.Watch(work.folder, wanted, missing) as watch:
        try:
            with progress.task("train", title, lines=False):
                trainer.fit()
        except Exception as error:
            found = unwrap(error) or error
            if isinstance(found, Interrupted) and watch.reason is not None and interrupt.received() is None:
                return watch.reason
            raise found from error
    return None


def _ray_trainer(work: Work, loop: Loop, callback: UserCallback | None) -> TorchTrainer:
    config, scaling = work.config, work.config.scaling
    # Read by Ray Train's controller, which asks every worker twice a second.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(scaling.collective_timeout)
    from ray import train as ray_train
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        loop,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "dataset": work.dataset_uri,
            "folder": work.folder,
            "until": work.until,
            "start": None if work.start is None else vars(work.start),
            "report": callback is not None,
            "log": log.setting(),
        },
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
        scaling_config=ray_train.ScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=scaling.use_gpu,
            resources_per_worker=resources.of_worker(scaling),
        ),
        run_config=ray_train.RunConfig(
            name="ray",
            callbacks=[callback] if callback is not None else [],
            logging_config=ray_train.LoggingConfig(log_level="CRITICAL"),  # errors are raised, too
            storage_path=work.folder if "://" in work.folder else os.path.abspath(work.folder),
        ),
    )
    if runtime.is_own():
        private_ray.drop_placement_group_cleaner(trainer)
    if interrupt.is_graceful():
        private_ray.keep_ctrl_c(trainer)
    private_ray.keep_store_on_loopback(trainer)
    return trainer
