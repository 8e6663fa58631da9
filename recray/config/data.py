"""The [data] table and its nested tables: which log, which columns, how it is split."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any, Literal, TypeVar

from pydantic import (
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from recray.config.plugins import options_of, typed
from recray.config.section import Section
from recray.config.sources import ParquetOptions, SourceOptions

T = TypeVar("T")
DURATION = re.compile(r"(\d+(?:\.\d+)?)([dhms])")


def check_duration(value: T) -> T:
    """The value. Raises ValueError if it is text that is no duration."""
    if isinstance(value, str) and not DURATION.fullmatch(value.strip()):
        raise ValueError("not a duration: write a number and d, h, m or s, for example '7d' or '12h'")
    return value


class ColumnsConfig(Section):
    """Roles of the log's columns."""

    user: str = Field("user_id", description="column of the user id")
    item: str = Field("item_id", description="column of the item id")
    timestamp: str | None = Field(
        None, description="column of the event time; unset: events are ordered as in the files"
    )
    label: str | None = Field(
        None,
        description="column of the label: 1 = chosen, 0 = shown and not chosen; rankers learn from both, retrievers from chosen items",
    )
    weight: str | None = Field(None, description="column of the event's weight in the loss and in click metrics")
    split: str | None = Field(None, description="column that names the split, for split.kind = 'given'")
    context: list[str] = Field([], description="columns known at request time, e.g. device, hour")


class SplitConfig(Section):
    """How events are divided into train, valid and test. Durations: 7d, 12h, 30m, 45s; fractions: 0.1."""

    kind: Literal["temporal", "leave_last", "given"] = Field(
        "temporal",
        description="temporal: by time; leave_last: each user's last event is test, the one before it valid; given: by files or a column",
    )
    valid: float | str = Field(
        0.1,
        description="temporal: fraction of events, or duration, before the test period; given: fraction of train events to draw if no valid files are named",
    )
    test: float | str = Field(0.1, description="temporal: fraction of events, or duration, at the end of the log")
    valid_start: datetime | None = Field(
        None, description="temporal: ISO time instead of `valid`, e.g. 2017-10-07T15:00:00Z"
    )
    test_start: datetime | None = Field(None, description="temporal: ISO time instead of `test`")
    start: datetime | None = Field(None, description="temporal: drop events before this time")
    end: datetime | None = Field(None, description="temporal: drop events at or after this time")
    train_path: str | list[str] | None = Field(None, description="given: files of the train split")
    valid_path: str | list[str] | None = Field(None, description="given: files of the valid split")
    test_path: str | list[str] | None = Field(None, description="given: files of the test split")

    @field_validator("valid", "test")
    @classmethod
    def _duration(cls, value: float | str) -> float | str:
        return check_duration(value)


class FeatureConfig(Section):
    """One feature column beyond the ids."""

    kind: Literal["categorical", "list", "numeric"] = Field(
        description="one category, a list of categories, or a number"
    )
    min_count: int = Field(1, ge=1, description="categorical and list: rarer values share the unknown id 1")
    hash_buckets: int | None = Field(
        None, ge=2, description="categorical and list: hash values to this many ids instead of storing a vocabulary"
    )
    scale: Literal["standard", "log", "quantiles"] = Field(
        "standard",
        description="numeric: (x - mean) / std; the same of sign(x) log(1 + |x|); or an embedding per interval between quantiles",
    )
    quantiles: int = Field(32, ge=2, description="numeric with scale 'quantiles': number of intervals")

    @model_validator(mode="after")
    def _fits(self) -> FeatureConfig:
        if self.kind == "numeric" and self.hash_buckets:
            raise ValueError("hash_buckets is for kind 'categorical' or 'list'; for numbers use scale = 'quantiles'")
        if self.kind != "numeric" and self.scale != "standard":
            raise ValueError(f"scale = '{self.scale}' is for kind 'numeric'")
        return self


class NegativesConfig(Section):
    """Negatives for logs that contain choices only: items that the user was not seen to choose, so that a ranker has both labels.

    They are written to the shards: every model trains on the same rows.
    """

    per_positive: int = Field(1, ge=1, description="negatives per event, with the event's user, time and context")
    draw: Literal["popularity", "uniform", "recent", "targets"] = Field(
        "popularity",
        description="popularity: in proportion to train events; uniform: all items alike; recent: from the last events of all users before the positive; targets: from all events that are targets in the positive's split",
    )
    recent_events: int = Field(
        10_000,
        ge=1,
        description="recent: number of events before the positive to draw from, of those with data.min_history earlier ones",
    )


class DataConfig(Section):
    source: str = Field(
        "parquet", description="parquet, simulated, a file <name>.py next to the TOML, or an import path"
    )
    path: str | list[str] | None = Field(None, description="file, folder, glob or list of them; local, s3:// or gs://")
    items: str | None = Field(None, description="Parquet table of item features, keyed by columns.item")
    users: str | None = Field(None, description="Parquet table of user features, keyed by columns.user")
    columns: ColumnsConfig = Field(ColumnsConfig(), description="roles of the log's columns")
    item_features: dict[str, FeatureConfig] = Field(
        {}, description="item features by column name; empty: every usable column of the item table"
    )
    user_features: dict[str, FeatureConfig] = Field(
        {}, description="user features by column name; empty: every usable column of the user table"
    )
    context_features: dict[str, FeatureConfig] = Field(
        {}, description="context features by column name; columns.context lists the columns"
    )
    timestamp_unit: Literal["auto", "s", "ms", "us", "ns", "order"] = Field(
        "auto", description="unit of integer timestamps; order: a position instead of a time; auto: inferred"
    )
    drop_duplicates: bool = Field(
        True,
        description="of rows that repeat (user, item, timestamp) keep the one with the greatest label, then weight; without timestamps of rows that repeat (user, item)",
    )
    min_user_events: int = Field(
        0,
        ge=0,
        description="drop users with fewer train events, chosen or only shown, before items are counted; valid and test events do not count",
    )
    min_item_events: int = Field(
        1,
        ge=1,
        description="treat items with fewer train events, chosen or only shown, as unknown; their train events are left out",
    )
    k_core: bool = Field(
        False,
        description="repeat min_user_events and min_item_events until every user and item left has that many train events with the others",
    )
    min_history: int = Field(
        0,
        ge=0,
        description="events with fewer earlier events of their user serve as history only, not as examples or targets",
    )
    negatives: NegativesConfig | None = Field(
        None, description="draw negatives, to train a ranker on a log without labels"
    )
    split: SplitConfig = Field(SplitConfig(), description="how events are divided into train, valid and test")
    append: bool = Field(
        False,
        description="keep the sorted events in the dataset; a log that has grown by new files, last in order of their names, is then prepared from there: only these files are read, and ids and encodings of features stay as they are (splits by time and leave_last)",
    )
    shard_events: int = Field(262_144, ge=1, description="approximate number of events per prepared shard")
    options: SerializeAsAny[SourceOptions] = Field(
        ParquetOptions(), description="options of the source; in TOML the table [data.<source>]"
    )

    @model_validator(mode="before")
    @classmethod
    def _moved(cls, value: Any) -> Any:
        """The table that has the source's name is the field `options`."""
        if not isinstance(value, dict) or isinstance(value.get("options"), SourceOptions):
            return value
        source = str(value.get("source", "parquet"))
        table = source.rpartition(".")[2]
        if table in cls.model_fields:
            raise ValueError(f"source = '{source}': a source cannot be called '{table}', which is a key of [data]")
        if "options" in value:
            raise ValueError(f"unknown key 'options': options of the source are written as [data.{table}]")
        return {**{key: one for key, one in value.items() if key != table}, "options": value.get(table, {})}

    @field_validator("source")
    @classmethod
    def _known(cls, value: str) -> str:
        options_of("source", value)
        return value

    @field_validator("options", mode="before")
    @classmethod
    def _typed(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, SourceOptions) or "source" not in info.data:
            return value
        return typed("source", info.data["source"], value)

    @model_serializer(mode="wrap")
    def _named(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        table: dict[str, Any] = handler(self)
        if options := table.pop("options", None):
            table[self.source.rpartition(".")[2]] = options
        return table
