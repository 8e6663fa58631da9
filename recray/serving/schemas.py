"""Requests and answers of `recray serve`, as pydantic checks them and the OpenAPI page shows them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictStr, model_validator

Int64 = Annotated[int, Field(strict=True, ge=-(2**63), le=2**63 - 1)]
Key = Int64 | Annotated[StrictStr, Field(max_length=1000)]
Scalar = StrictBool | Int64 | StrictFloat | Annotated[StrictStr, Field(max_length=1000)] | None
Values = dict[str, Scalar | Annotated[list[Scalar], Field(max_length=1000)]]
History = Annotated[list[Key], Field(max_length=10_000)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Person(_Strict):
    """A user, or what anyone chose."""

    user: Key | None = Field(None, description="key of a user; unknown users get popular items")
    history: History | None = Field(None, description="instead of `user`: item keys, oldest first")
    context: Values = Field(
        {}, description="raw values of context features by name; without one that of the last event"
    )
    user_features: Values = Field(
        {}, description="raw values of user features by name, instead of those that are known"
    )

    @model_validator(mode="after")
    def _one(self) -> Person:
        if (self.user is None) == (self.history is None):
            raise ValueError("give either `user` or `history`")
        return self


class Range(_Strict):
    min: Int64 | StrictFloat | None = None
    max: Int64 | StrictFloat | None = None

    @model_validator(mode="after")
    def _any(self) -> Range:
        if self.min is None and self.max is None:
            raise ValueError("give `min`, `max` or both")
        return self


class RecommendRequest(Person):
    k: int = Field(10, strict=True, ge=1, le=1000, description="items of the list")
    exclude: Annotated[list[Key], Field(max_length=1000)] = Field(
        [], description="item keys that must not be in the list"
    )
    filters: dict[str, Range | Annotated[list[Scalar], Field(max_length=1000)]] = Field(
        {}, description="what all items must be: values of an item feature of which one must hold, or `min` and `max`"
    )
    caps: dict[str, Annotated[int, Field(strict=True, ge=1)]] = Field(
        {}, description="by item feature: how many items of one value the list may hold"
    )
    exclude_seen: bool | None = Field(None, description="leave out the history; null: as evaluation.filter_seen says")


class ScoreRow(Person):
    item: Key


class ScoreRequest(_Strict):
    rows: Annotated[list[ScoreRow], Field(min_length=1, max_length=1000)]


class SimilarRequest(_Strict):
    item: Key
    k: int = Field(10, strict=True, ge=1, le=1000)


class Item(BaseModel):
    item: int | str
    title: str | None = Field(None, description="if the item table has titles")
    score: float | None = Field(description="null: a popular item for someone without a history")


class Answer(BaseModel):
    model: str = Field(description="identity of the checkpoint that answered")
    request: str = Field(description="id of this request, which the log has, too")


class Items(Answer):
    items: list[Item]


class Scores(Answer):
    scores: list[float] = Field(description="probability that the item is chosen, of each row")


class Problem(BaseModel):
    detail: str | list[dict[str, Any]]


ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "The token is missing or wrong"},
    411: {"model": Problem, "description": "Content-Length is missing"},
    413: {"model": Problem, "description": "The body is too large"},
    415: {"model": Problem, "description": "The body is not sent as application/json"},
    422: {"model": Problem, "description": "The body is no JSON, or a value is wrong; the detail says which and why"},
    429: {"model": Problem, "description": "The request would wait too long; try again after Retry-After"},
}
