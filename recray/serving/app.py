"""The routes of `recray serve`: POST /recommend, /score, /similar; GET /health, /ready, /metrics, /docs, /openapi.json."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

import pyarrow as pa
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictStr, model_validator

import recray
from recray import log
from recray.errors import DataError
from recray.ids import FIRST_ITEM
from recray.serving.service import Model, Overloaded, Service, ranker_of, retriever_of

_BODY = 1 << 20  # bytes
_BEARER = HTTPBearer(auto_error=False)

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


class RecommendRequest(Person):
    k: int = Field(10, strict=True, ge=1, le=1000, description="items of the list")
    exclude: Annotated[list[Key], Field(max_length=1000)] = Field(
        [], description="item keys that must not be in the list"
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


_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The body is no JSON"},
    401: {"model": Problem, "description": "The token is missing or wrong"},
    411: {"model": Problem, "description": "Content-Length is missing"},
    413: {"model": Problem, "description": "The body is too large"},
    422: {"model": Problem, "description": "A value is wrong; the detail says which and why"},
    429: {"model": Problem, "description": "Too many requests wait; try again after Retry-After"},
}


class _Metrics:
    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("recray_requests_total", "Requests", ["path", "status"], registry=self.registry)
        self.seconds = Histogram(
            "recray_request_seconds",
            "Time to answer",
            ["path"],
            buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0),
            registry=self.registry,
        )
        self.batch = Histogram(
            "recray_batch_size", "Requests answered together", buckets=(1, 2, 4, 8, 16, 32), registry=self.registry
        )
        service.observe_batch = self.batch.observe
        waiting = Gauge("recray_waiting", "Requests that wait", registry=self.registry)
        waiting.set_function(lambda: service.waiting)
        self._model = Gauge("recray_model", "1 for what is served", ["identity"], registry=self.registry)
        swaps = Gauge("recray_swaps", "Models swapped in since the start", registry=self.registry)
        swaps.set_function(lambda: service.swaps)
        failures = Gauge("recray_swap_failures", "Promoted models that could not be loaded", registry=self.registry)
        failures.set_function(lambda: service.failures)

    def render(self, identity: str) -> bytes:
        self._model.clear()
        self._model.labels(identity).set(1)
        text: bytes = generate_latest(self.registry)
        return text


def create_app(service: Service, token: str | None = None, poll: float = 5.0) -> FastAPI:
    """token: what requests must bring as `Authorization: Bearer TOKEN`; None: nothing. poll: see Service.start."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        service.start(poll)
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(title="recray", version=recray.__version__, lifespan=life)
    metrics = _Metrics(service)
    _watch(app, metrics)
    _errors(app)
    _probes(app, service, metrics)
    _questions(app, service, [Depends(_guard(token))])
    return app


def _guard(token: str | None) -> Callable[..., None]:
    def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]) -> None:
        if token and not (given and secrets.compare_digest(given.credentials.encode(), token.encode())):
            raise HTTPException(401, "send the token as `Authorization: Bearer TOKEN`", {"WWW-Authenticate": "Bearer"})

    return check


def _watch(app: FastAPI, metrics: _Metrics) -> None:
    """Count, time and log every request; refuse large bodies before they are read."""

    @app.middleware("http")
    async def watch(request: Request, follow: Callable[[Request], Awaitable[Response]]) -> Response:
        started, request.state.id = time.perf_counter(), uuid.uuid4().hex
        size = request.headers.get("content-length", "")
        if request.method == "POST" and not (size.isascii() and size.isdigit()):
            response: Response = _problem(411, "send Content-Length")
        elif request.method == "POST" and int(size) > _BODY:
            response = _problem(413, f"the body has {size} bytes, at most {_BODY} are allowed")
        else:
            response = await follow(request)
        seconds = time.perf_counter() - started
        route = request.scope.get("route")
        path = getattr(route, "path", "other")
        metrics.requests.labels(path, response.status_code).inc()
        metrics.seconds.labels(path).observe(seconds)
        values = {
            "request": request.state.id,
            "path": path,
            "status": response.status_code,
            "seconds": round(seconds, 5),
        }
        values |= {"model": getattr(request.state, "model", "")}
        log.info("serve", f"{path} {response.status_code} {1000 * seconds:.1f} ms", event="request", values=values)
        return response


def _errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: Exception) -> Response:
        # Without the input, which may be no valid JSON: NaN, lone surrogates.
        assert isinstance(error, RequestValidationError)
        found = [{"where": ".".join(map(str, one["loc"])), "problem": one["msg"]} for one in error.errors()]
        return JSONResponse({"detail": found}, 422)

    @app.exception_handler(DataError)
    async def unknown(_: Request, error: Exception) -> Response:
        return _problem(422, str(error))

    @app.exception_handler(Overloaded)
    async def full(_: Request, error: Exception) -> Response:
        response = _problem(429, "too many requests wait: try again in a second")
        response.headers["Retry-After"] = "1"
        return response


def _problem(status: int, detail: str) -> JSONResponse:
    return JSONResponse({"detail": detail.encode(errors="replace").decode()}, status)


def _probes(app: FastAPI, service: Service, metrics: _Metrics) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"model": Problem}})
    async def ready() -> dict[str, str]:
        """Whether requests can be answered, and by what."""
        if not service.alive:
            raise HTTPException(503, "the model is not served")
        return {"status": "ready", "model": service.loaded.model.identity}

    @app.get("/metrics", response_class=Response)
    async def scrape() -> Response:
        """In Prometheus' text format."""
        return Response(metrics.render(service.loaded.model.identity), media_type=CONTENT_TYPE_LATEST)


def _questions(app: FastAPI, service: Service, guards: Sequence[Any]) -> None:
    async def ask(http: Request, group: tuple[Any, ...], request: Any, answer: Any) -> dict[str, Any]:
        identity, found = await asyncio.wrap_future(service.submit(group, request, answer))
        http.state.model = identity
        return {"model": identity, "request": http.state.id, **found}

    @app.post("/recommend", response_model=Items, responses=_ERRORS, dependencies=guards)
    async def recommend(body: RecommendRequest, http: Request) -> dict[str, Any]:
        """The best items for a user or a history. Unknown users and empty histories get popular items with score null."""
        return await ask(http, ("recommend", body.exclude_seen, *_shape(body)), body, _recommend)

    @app.post("/score", response_model=Scores, responses=_ERRORS, dependencies=guards)
    async def score(body: ScoreRequest, http: Request) -> dict[str, Any]:
        """The probability that each row's item is chosen, by the ranker that is served."""
        return await ask(http, ("score",), body, _score)

    @app.post("/similar", response_model=Items, responses=_ERRORS, dependencies=guards)
    async def similar(body: SimilarRequest, http: Request) -> dict[str, Any]:
        """The items whose vectors are nearest to the item's, by cosine."""
        return await ask(http, ("similar",), body, _similar)


def _shape(person: Person) -> tuple[Any, ...]:
    """Requests of the same shape are one table."""
    return person.user is None, tuple(sorted(person.context)), tuple(sorted(person.user_features))


def _columns(people: Sequence[Person], role: str) -> dict[str, list[Any]]:
    return {name: [getattr(one, role)[name] for one in people] for name in getattr(people[0], role)}


def _recommend(model: Model, requests: Sequence[RecommendRequest]) -> list[dict[str, Any]]:
    by_user = requests[0].user is not None
    retriever = retriever_of(model)
    _, found = retriever.answer(
        [one.user for one in requests] if by_user else None,
        None if by_user else [one.history or [] for one in requests],
        _columns(requests, "context"),
        _columns(requests, "user_features"),
        max(one.k for one in requests),
        requests[0].exclude_seen,
        [one.exclude for one in requests],
    )
    answers = []
    for one, ids, scores, scored in zip(requests, found.ids_BK, found.scores_BK.tolist(), found.scored_B, strict=True):
        keys = retriever.inputs.items.take(pa.array(ids[: one.k])).to_pylist()
        pairs = zip(keys, ids.tolist(), scores, strict=False)
        answers.append({"items": [{"item": k, "score": s if scored else None} for k, n, s in pairs if n >= FIRST_ITEM]})
    return answers


def _score(model: Model, requests: Sequence[ScoreRequest]) -> list[dict[str, Any]]:
    ranker = ranker_of(model)
    names = ranker.config.data.columns
    groups: dict[tuple[Any, ...], list[tuple[int, int, ScoreRow]]] = {}
    for number, request in enumerate(requests):
        for at, row in enumerate(request.rows):
            groups.setdefault(_shape(row), []).append((number, at, row))
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


def _similar(model: Model, requests: Sequence[SimilarRequest]) -> list[dict[str, Any]]:
    found = (retriever_of(model).similar_items(one.item, one.k) for one in requests)
    return [{"items": table.select(["item", "score"]).to_pylist()} for table in found]
