"""By events in a window before the split, the same list for all of its queries."""

from __future__ import annotations

from recray.config.baselines import RecentPopularityOptions as Options
from recray.data.dataset import PreparedDataset
from recray.data.split import before, duration
from recray.errors import NotApplicableError
from recray.retrieval.baselines.popularity import Popularity
from recray.retrieval.events import event_counts


def build(options: Options, dataset: PreparedDataset, split: str) -> Popularity:
    """Raises NotApplicableError for a log without times."""
    if not dataset.record.has_time:
        raise NotApplicableError("the log has no times: it needs data.columns.timestamp and data.timestamp_unit")
    until = dataset.record.starts(split)
    return Popularity(event_counts(dataset, before(split), until - duration(options.window), until))
