"""The [data] table and what lies in it: which log, which columns, how it is split."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field, model_validator

from recray.config.section import Section


class ColumnsConfig(Section):
    """Which column of the log plays which role."""

    user: str = "user_id"
    item: str = "item_id"
    timestamp: str | None = Field(None, description="event time; without one, file order is the order")
    label: str | None = Field(
        None,
        description="1 = chosen, 0 = shown and not chosen; rankers learn from both, retrievers from what was chosen",
    )
    weight: str | None = None
    split: str | None = Field(None, description="column that names the split, for split.kind = 'given'")
    context: list[str] = Field([], description="columns known at request time, e.g. device, hour")


class SplitConfig(Section):
    """How events are divided. Durations: '7d', '12h', '30m', '45s'; fractions: 0.1 (of the events, by time)."""

    kind: Literal["temporal", "leave_last", "given"] = "temporal"
    valid: float | str = Field(
        0.1,
        description="temporal: fraction of events or duration before the test period; given: fraction of train events drawn when no valid files are named",
    )
    test: float | str = Field(0.1, description="temporal: fraction of events or duration at the end")
    valid_start: datetime | None = Field(
        None, description="temporal: ISO time instead of `valid`, e.g. 2017-10-07T15:00:00Z"
    )
    test_start: datetime | None = Field(None, description="temporal: ISO time instead of `test`")
    start: datetime | None = Field(None, description="temporal: events before this time are dropped and counted")
    end: datetime | None = Field(None, description="temporal: events at or after this time are dropped and counted")
    train_path: str | list[str] | None = Field(None, description="given: files of each split")
    valid_path: str | list[str] | None = None
    test_path: str | list[str] | None = None


class FeatureConfig(Section):
    """One feature column beyond the ids."""

    kind: Literal["categorical", "list", "numeric"]
    min_count: int = Field(1, ge=1, description="categorical and list: rarer values share the unknown id 1")
    hash_buckets: int | None = Field(
        None, ge=2, description="categorical and list: hash values to so many ids instead of keeping a vocabulary"
    )
    scale: Literal["standard", "log", "quantiles"] = Field(
        "standard",
        description="numeric: (x - mean) / std; the same of sign(x) log(1 + |x|); or the id of the interval between quantiles, with a vector each",
    )
    quantiles: int = Field(32, ge=2, description="numeric with scale 'quantiles': how many intervals")

    @model_validator(mode="after")
    def _fits(self) -> FeatureConfig:
        if self.kind == "numeric" and self.hash_buckets:
            raise ValueError("hash_buckets is for kind 'categorical' or 'list'; for numbers use scale = 'quantiles'")
        if self.kind != "numeric" and self.scale != "standard":
            raise ValueError(f"scale = '{self.scale}' is for kind 'numeric'")
        return self


class NegativesConfig(Section):
    """Items that a user was not seen to choose, drawn for logs of choices only, so that a ranker has both labels.

    Written to the shards: every model sees the same rows.
    """

    per_positive: int = Field(1, ge=1, description="drawn for every event, with its user, time and context")
    draw: Literal["popularity", "uniform", "recent"] = Field(
        "popularity",
        description="in proportion to train events; every item alike; or from the log's last events before the positive",
    )
    recent_events: int = Field(10_000, ge=1, description="recent: how many events before the positive are drawn from")


class MovielensConfig(Section):
    name: Literal["ml-100k", "ml-1m", "ml-10m", "ml-20m", "ml-25m"] = "ml-100k"
    min_rating: float = Field(0.0, description="ratings below this are not events")


class SimulatedConfig(Section):
    """The behaviour simulator (recray.data.sources.simulated)."""

    events: int = Field(200_000, ge=1_000)
    users: int = Field(4_000, ge=10)
    items: int = Field(2_000, ge=10)
    categories: int = Field(20, ge=2)
    interests: int = Field(16, ge=2, description="width of the latent interest vectors")
    drift: float = Field(0.05, ge=0, le=1, description="how far a user's interests move between sessions")
    zipf: float = Field(0.9, ge=0, description="exponent of item popularity")


class DataConfig(Section):
    source: str = Field("parquet", description="parquet, movielens, simulated, or an import path 'package.module'")
    path: str | list[str] | None = Field(None, description="file, folder, glob or list of them; local, s3:// or gs://")
    items: str | None = Field(None, description="Parquet table of item features, keyed by columns.item")
    users: str | None = Field(None, description="Parquet table of user features, keyed by columns.user")
    columns: ColumnsConfig = ColumnsConfig()
    item_features: dict[str, FeatureConfig] = {}
    user_features: dict[str, FeatureConfig] = {}
    context_features: dict[str, FeatureConfig] = {}
    timestamp_unit: Literal["auto", "s", "ms", "us", "ns", "order"] = Field(
        "auto", description="unit of integer timestamps; 'order' = a position, not a time"
    )
    drop_duplicates: bool = Field(True, description="drop rows that repeat (user, item, timestamp)")
    min_user_events: int = Field(1, ge=1)
    min_item_events: int = Field(1, ge=1)
    min_history: int = Field(
        0, ge=0, description="events with fewer earlier ones of their user are history only, never examples or targets"
    )
    negatives: NegativesConfig | None = Field(
        None, description="draw items that were not chosen, for click ranking on a log without labels"
    )
    split: SplitConfig = SplitConfig()
    shard_events: int = Field(262_144, ge=1, description="events per prepared shard, about")
    movielens: MovielensConfig = MovielensConfig()
    simulated: SimulatedConfig = SimulatedConfig()
