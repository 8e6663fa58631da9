"""The ranker behind a retriever: another run's checkpoint, trained on the same dataset."""

from __future__ import annotations

from torch import nn

from recray.artifacts import CHECKPOINT, in_use
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.errors import ConfigError
from recray.models import Ranker
from recray.training import checkpoint


def open_ranker(config: Config, dataset: PreparedDataset) -> tuple[nn.Module, int, int] | None:
    """The model of `retrieval.ranker`, how many candidates it gets, and its history length; None where there is none.

    Raises LineageError when it was trained on another dataset: its item ids mean other items.
    """
    if config.retrieval.ranker is None:
        return None
    folder = in_use(config.retrieval.ranker, CHECKPOINT).uri
    record = checkpoint.record_of(folder, dataset)
    model, _ = checkpoint.load_model(folder)
    if not isinstance(model, Ranker):
        name = record.config["model"]["name"]
        raise ConfigError(f"retrieval.ranker = '{config.retrieval.ranker}' holds '{name}', which is no ranker")
    return model, config.retrieval.k, int(record.config["model"]["history_length"])


def ranker_parents(config: Config) -> list[str]:
    """Id of the ranker's checkpoint, for records."""
    if config.retrieval.ranker is None:
        return []
    return [in_use(config.retrieval.ranker, CHECKPOINT).record.id]
