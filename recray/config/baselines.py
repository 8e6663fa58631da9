"""[evaluation.baseline_options.<name>]: options of the baselines that `evaluation.baselines` names.

A baseline outside the package keeps its `Options` and its `build` in one file (recray/retrieval/README.md).
"""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from recray.config.data import check_duration
from recray.config.section import Section


class BaselineOptions(Section):
    """Options of a baseline; its own `Options` extends it."""


class RecentPopularityOptions(BaselineOptions):
    window: str = Field(
        "1h", description="length of the period before the split whose events are counted, e.g. 30m, 7d"
    )


class RollingPopularityOptions(BaselineOptions):
    window: str | None = Field(
        None,
        description="length of the period before each query whose events are counted, e.g. 10m; unset: 1h without half_life",
    )
    half_life: str | None = Field(
        None, description="instead of a window: the age at which an event's weight is halved, e.g. 30m"
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> RollingPopularityOptions:
        if self.window is not None and self.half_life is not None:
            raise ValueError("has both window and half_life: set one of them")
        return self


class RecentCountsOptions(BaselineOptions):
    """What recray.retrieval.recent_counts counts."""

    window: str = Field(
        "1h",
        description="length of the period before each query in which choices after the user's last items are counted",
    )
    popularity_window: str = Field(
        "10m", description="length of the period before each query in which events of each item are counted"
    )
    last_items: int = Field(
        3, ge=0, le=20, description="how many of the user's last items count; each has half the weight of the next one"
    )
    smoothing: float = Field(
        50, gt=0, description="events of the popular items that are added to the choices after an item"
    )

    @field_validator("window", "popularity_window")
    @classmethod
    def _duration(cls, value: str) -> str:
        checked = check_duration(value)
        assert checked is not None
        return checked


class ItemKNNOptions(BaselineOptions):
    neighbours: int | None = Field(
        None,
        ge=0,
        description="most similar items kept of each item, here and in the blend (retrieval.item_knn_weight); 0 = all; unset: all in catalogues of up to 20,000 items, else 1,000",
    )


# Baseline name -> options.
SHIPPED: dict[str, type[BaselineOptions]] = {
    "popularity": BaselineOptions,
    "recent_popularity": RecentPopularityOptions,
    "rolling_popularity": RollingPopularityOptions,
    "transitions": RecentCountsOptions,
    "hindsight": BaselineOptions,
    "item_knn": ItemKNNOptions,
    "oracle": BaselineOptions,
}
BASE = BaselineOptions
