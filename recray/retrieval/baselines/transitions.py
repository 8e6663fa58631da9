"""By what was chosen right after the user's last items in a window before each query (recray.retrieval.recent_counts).

Someone without earlier items gets what was popular in the popularity window before the query.
"""

from __future__ import annotations

from recray.config.baselines import RecentCountsOptions as Options
from recray.data.dataset import PreparedDataset
from recray.data.split import before
from recray.retrieval.recent_counts import RecentCounts


def build(options: Options, dataset: PreparedDataset, split: str) -> RecentCounts:
    """By the events of this split and of those before it. Raises NotApplicableError for a log without times."""
    return RecentCounts.of(options, dataset, (*before(split), split))
