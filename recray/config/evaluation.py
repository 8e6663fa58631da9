"""[evaluation], [promotion] and [report]: metrics and baselines, what may be served, the page."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializeAsAny, field_validator

from recray.config.baselines import BaselineOptions
from recray.config.plugins import options_of, typed
from recray.config.section import Section


def _known_baselines(names: list[str]) -> list[str]:
    for name in names:
        options_of("baseline", name)
    return names


Baselines = Annotated[list[str], AfterValidator(_known_baselines)]


class EvaluationConfig(Section):
    k: list[int] = Field([10, 20, 50], description="list lengths at which list metrics are computed")
    queries: Literal["user", "event"] = Field(
        "user",
        description="user: one query per user at the start of the split, targets are all later items; event: one query per later event",
    )
    max_queries: int | None = Field(
        None,
        ge=1,
        description="evaluate lists on about so many queries, of users drawn once by run.seed; intervals are those of the drawn users; unset: all queries (training.max_valid_queries is for validation)",
    )
    filter_seen: bool = Field(True, description="do not recommend items of the user's history again")
    batch_size: int = Field(512, ge=1, description="queries scored at a time")
    bootstrap: int = Field(500, ge=0, description="resamples for the 95 % intervals; 0 = no intervals")
    metrics: list[str] = Field(
        [], description="your own metrics to add to the report; list metrics are computed at every k, so without @K"
    )
    slices: list[str] = Field(
        [], description="names of user and item features by whose values the report groups metrics, too"
    )
    baselines: Baselines = Field(
        ["popularity", "item_knn", "oracle"],
        description="baselines in the report: shipped ones (popularity, recent_popularity, rolling_popularity, transitions, item_knn, hindsight, oracle) or your own",
    )
    baseline_options: dict[str, SerializeAsAny[BaselineOptions]] = Field(
        {}, description="options of baselines, a table per name, e.g. [evaluation.baseline_options.recent_popularity]"
    )

    @field_validator("k")
    @classmethod
    def _k_sorted(cls, value: list[int]) -> list[int]:
        if not value or min(value) < 1:
            raise ValueError("needs at least one k >= 1")
        return sorted(set(value))

    @field_validator("baseline_options", mode="before")
    @classmethod
    def _typed_options(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: typed("baseline", name, table, key=name) for name, table in value.items()}


class PromotionConfig(Section):
    metric: str | None = Field(
        None, description="list metric that `recray promote` compares by, e.g. hr@10; unset: training.metric"
    )
    margin: float = Field(
        0.02,
        ge=0,
        lt=1,
        description="largest loss of that metric against what is served, and against each baseline, relative to theirs; the whole 95 % interval of the difference must lie above it",
    )
    baselines: Baselines = Field(
        ["rolling_popularity"], description="baselines that the candidate is compared with; empty: none"
    )
    max_unknown: float = Field(
        0.5, ge=0, le=1, description="largest share of the newest events whose item the candidate does not know"
    )


class ReportConfig(Section):
    """The page of a report; `recray report` writes it again."""

    title: str | None = Field(
        None,
        description="column of the item table that names items in example lists; unset: the first one of text called title, headline, name or label",
    )
