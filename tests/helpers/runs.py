"""Where a run's artefacts lie, for tests that look into them."""

from __future__ import annotations

from recray.artifacts import CHECKPOINT, Run
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.training import launch
from recray.training.phase import Phase


def dataset_of(config: Config) -> PreparedDataset:
    return PreparedDataset.of(Run(config))


def checkpoint_folder(config: Config) -> str:
    """The folder of the configuration's checkpoint, complete or not."""
    run = Run(config)
    return run.artifact(CHECKPOINT, [run.dataset().record.id]).uri


def selection(config: Config) -> Phase:
    """The epochs of the configuration's training."""
    return launch.selection(config, checkpoint_folder(config))
