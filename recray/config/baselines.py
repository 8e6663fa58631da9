"""[evaluation.baseline_options.<name>]: options of the baselines that `evaluation.baselines` names.

A baseline outside the package keeps its `Options` and its `build` in one file (recray/retrieval/README.md).
"""

from __future__ import annotations

from pydantic import Field

from recray.config.section import Section


class BaselineOptions(Section):
    """Options of a baseline; its own `Options` extends it."""


class RecentPopularityOptions(BaselineOptions):
    window: str = Field(
        "1h", description="length of the period before the split whose events are counted, e.g. 30m, 7d"
    )


# Baseline name -> options.
SHIPPED: dict[str, type[BaselineOptions]] = {
    "popularity": BaselineOptions,
    "recent_popularity": RecentPopularityOptions,
    "hindsight": BaselineOptions,
    "item_knn": BaselineOptions,
    "oracle": BaselineOptions,
}
BASE = BaselineOptions
