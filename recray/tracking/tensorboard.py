"""TensorBoard: one folder of event files per training, in <output>/<name>/tensorboard unless `folder` says otherwise.

pip install 'recray[tensorboard]'
tensorboard --logdir runs
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from recray import storage
from recray.config.trackers import TensorboardOptions as Options
from recray.errors import ConfigError
from recray.tracking import Status, TrackedRun

__all__ = ["Options", "build"]


class _Tensorboard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def files(self, uris: Sequence[str]) -> None:
        self._writer.add_text("reports", "\n\n".join(uris))

    def close(self, status: Status) -> None:
        self._writer.close()


def build(options: Options, run: TrackedRun) -> _Tensorboard:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("tensorboard is not installed: pip install 'recray[tensorboard]'") from error
    root = options.folder or storage.join(run.run_uri, "tensorboard")
    writer = SummaryWriter(storage.join(root, run.identity))
    body = json.dumps({"tags": run.tags, "parameters": run.parameters}, indent=1)
    writer.add_text("run", f"    {body}".replace("\n", "\n    "))
    return _Tensorboard(writer)
