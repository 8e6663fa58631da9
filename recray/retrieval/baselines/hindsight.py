"""By events of the split itself, which are not known at its start: about the best that one fixed list can reach."""

from __future__ import annotations

from recray.config.baselines import BaselineOptions as Options
from recray.data.dataset import PreparedDataset
from recray.retrieval.baselines.popularity import Popularity
from recray.retrieval.events import event_counts


def build(options: Options, dataset: PreparedDataset, split: str) -> Popularity:
    return Popularity(event_counts(dataset, [split]))
