"""Requests of one shape, answered by one call of the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from recray.ids import FIRST_ITEM
from recray.inference import LoadedRetriever
from recray.serving.schemas import Person, Range, RecommendRequest, ScoreRequest, ScoreRow, SimilarRequest
from recray.serving.service import Group, Model, ranker_of, retriever_of

Answer: TypeAlias = "Callable[[Model, Sequence[Any]], list[dict[str, Any]]]"


def shape(person: Person) -> tuple[Any, ...]:
    """Requests of the same shape are one table."""
    return person.user is None, tuple(sorted(person.context)), tuple(sorted(person.user_features))


def group_of(request: RecommendRequest) -> Group:
    """Requests of one group are answered by one call."""
    filters = json.dumps(_filters(request), sort_keys=True)
    return "recommend", request.exclude_seen, filters, tuple(sorted(request.caps.items())), *shape(request)


def _filters(request: RecommendRequest) -> dict[str, Any]:
    return {
        name: one.model_dump(exclude_none=True) if isinstance(one, Range) else one
        for name, one in request.filters.items()
    }


def _columns(people: Sequence[Person], role: str) -> dict[str, list[Any]]:
    return {name: [getattr(one, role)[name] for one in people] for name in getattr(people[0], role)}


def recommend(model: Model, requests: Sequence[RecommendRequest]) -> list[dict[str, Any]]:
    by_user = requests[0].user is not None
    retriever = retriever_of(model)
    _, found = retriever.answer(
        [one.user for one in requests] if by_user else None,
        None if by_user else [one.history or [] for one in requests],
        _columns(requests, "context"),
        _columns(requests, "user_features"),
        max(one.k for one in requests),
        requests[0].exclude_seen,
        [one.exclude for one in requests] if any(one.exclude for one in requests) else None,
        _filters(requests[0]),
        requests[0].caps,
    )
    return [
        {"items": _items(retriever, ids[: one.k], scores[: one.k] if scored else None)}
        for one, ids, scores, scored in zip(requests, found.ids_BK, found.scores_BK, found.scored_B, strict=True)
    ]


def _items(model: LoadedRetriever, ids: np.ndarray, scores: np.ndarray | None) -> list[dict[str, Any]]:
    """The places of a list that are filled. scores: None for popular items."""
    filled = ids >= FIRST_ITEM
    keys = model.inputs.items.take(pa.array(ids[filled])).to_pylist()
    values: list[Any] = [None] * len(keys) if scores is None else scores[filled].tolist()
    if model.catalog.title is None:
        return [{"item": key, "score": value} for key, value in zip(keys, values, strict=True)]
    named = zip(keys, model.catalog.titles(ids[filled]), values, strict=True)
    return [{"item": key, "title": title, "score": value} for key, title, value in named]


def score(model: Model, requests: Sequence[ScoreRequest]) -> list[dict[str, Any]]:
    ranker = ranker_of(model)
    names = ranker.config.data.columns
    groups: dict[tuple[Any, ...], list[tuple[int, int, ScoreRow]]] = {}
    for number, request in enumerate(requests):
        for at, row in enumerate(request.rows):
            groups.setdefault(shape(row), []).append((number, at, row))
    scores = [[0.0] * len(request.rows) for request in requests]
    for rows in groups.values():
        for role, given in (("context", rows[0][2].context), ("user", rows[0][2].user_features)):
            ranker.inputs.check_names(given, role)
        table = [
            {names.item: row.item, **row.context, **row.user_features}
            | ({names.user: row.user} if row.user is not None else {"history": row.history})
            for _, _, row in rows
        ]
        for (number, at, _), found in zip(rows, ranker.score(table).tolist(), strict=True):
            scores[number][at] = found
    return [{"scores": one} for one in scores]


def similar(model: Model, requests: Sequence[SimilarRequest]) -> list[dict[str, Any]]:
    found = (retriever_of(model).similar_items(one.item, one.k) for one in requests)
    return [{"items": table.drop_columns(["rank"]).to_pylist()} for table in found]
