"""How many Ray workers train, on a cluster whose nodes come and go.

    sizes(config)                          # [4, 3, 2]: with num_workers = 4, min_workers = 2
    with Watch(folder, missing=1) as watch:
        trainer.fit()                      # raises Interrupted once the state is on disk
    watch.reason                           # "there are nodes for all 4 training workers now"

Training resumes exactly on any number of workers, so a change of their number is a save and a start.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from recray import log
from recray.cluster import private_ray, resources
from recray.config import Config, ScalingConfig
from recray.errors import ResourceError
from recray.training import interrupt

_AGAIN_SECONDS = 60.0  # that workers which start again wait for nodes, before fewer of them start
_FREE_SECONDS = 2.0  # for reserving what is free
_LOOK_EVERY = 5.0  # seconds


def sizes(config: Config) -> list[int]:
    """The numbers of workers that may train, largest first. All of them divide the global batch."""
    scaling, training = config.scaling, config.training
    least = scaling.min_workers or scaling.num_workers
    found = range(scaling.num_workers, least - 1, -1)
    return [size for size in found if training.global_batch_size % (size * training.accumulation_steps) == 0]


def wait_for_workers(config: Config, again: bool) -> Config:
    """Wait until the workers can be placed; returns the configuration with the number of those that can be.

    again: workers have trained before, so the nodes that are there are preferred to those that may come.
    Raises ResourceError where not even scaling.min_workers can be placed within scaling.wait_seconds.
    """
    allowed, scaling = sizes(config), config.scaling
    if len(allowed) == 1:
        resources.wait_for_workers(scaling)
        return config
    seconds = min(_AGAIN_SECONDS, scaling.wait_seconds) if again else scaling.wait_seconds
    for size in allowed:
        wanted = scaling.model_copy(update={"num_workers": size, "wait_seconds": seconds})
        try:
            resources.wait_for_workers(wanted)
        except ResourceError:
            # The largest number has waited: now those that fit already, and the smallest as long as it takes.
            seconds = _FREE_SECONDS
            continue
        if size < scaling.num_workers:
            log.warning(
                "cluster",
                f"{size} of {scaling.num_workers} training workers fit on this cluster: training goes on with those",
                event="fewer_workers",
                values={"workers": size, "wanted": scaling.num_workers},
            )
        return config.model_copy(update={"scaling": scaling.model_copy(update={"num_workers": size})})
    smallest = scaling.model_copy(update={"num_workers": allowed[-1]})
    resources.wait_for_workers(smallest)
    return config.model_copy(update={"scaling": smallest})


class Watch:
    """Asks the workers to save and stop when their number should change: a node is about to go, or one has come.

    folder: of the training. missing: workers that do not train for lack of nodes.
    """

    def __init__(self, folder: str, scaling: ScalingConfig, missing: int) -> None:
        self.reason: str | None = None  # why the workers were asked to stop
        self._folder, self._scaling, self._missing = folder, scaling, missing
        self._draining = private_ray.draining_nodes()  # known already: nothing was placed on these
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="recray-elastic", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        # What nodes have in all, not what is free: workers that are about to start have not taken theirs yet. Only more than
        # before counts, so that nodes which others use are not tried again and again.
        least = self._fit()
        while not self._ended.wait(_LOOK_EVERY):
            leaving, fit = private_ray.draining_nodes() - self._draining, self._fit()
            if leaving:
                self.reason = f"{len(leaving)} node{'s are' if len(leaving) > 1 else ' is'} about to be taken away"
            elif self._missing and fit >= self._scaling.num_workers and fit > least:
                self.reason = f"there are nodes for all {self._scaling.num_workers} training workers now"
            if self.reason is not None:
                interrupt.request(self._folder, self.reason)
                return
            least = min(least, fit)

    def _fit(self) -> int:
        return resources.fits(resources.of_worker(self._scaling), resources.of_nodes())
