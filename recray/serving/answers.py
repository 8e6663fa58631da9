"""Requests of one shape, answered by one call of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import pyarrow as pa

from recray.ids import FIRST_ITEM
from recray.serving.schemas import Person, RecommendRequest, ScoreRequest, ScoreRow, SimilarRequest
from recray.serving.service import Model, ranker_of, retriever_of

Answer: TypeAlias = "Callable[[Model, Sequence[Any]], list[dict[str, Any]]]"


def shape(person: Person) -> tuple[Any, ...]:
    """Requests of the same shape are one table."""
    return person.user is None, tuple(sorted(person.context)), tuple(sorted(person.user_features))


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
    )
    answers = []
    for one, ids, scores, scored in zip(requests, found.ids_BK, found.scores_BK.tolist(), found.scored_B, strict=True):
        keys = retriever.inputs.items.take(pa.array(ids[: one.k])).to_pylist()
        pairs = zip(keys, ids.tolist(), scores, strict=False)
        answers.append({"items": [{"item": k, "score": s if scored else None} for k, n, s in pairs if n >= FIRST_ITEM]})
    return answers


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
    return [{"items": table.select(["item", "score"]).to_pylist()} for table in found]
