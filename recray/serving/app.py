"""The routes of `recray serve`: POST /recommend, /score, /similar; GET /health, /ready, /metrics, /docs, /openapi.json."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pydantic
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST

import recray
from recray.errors import DataError
from recray.serving import answers
from recray.serving.door import Door, Metrics, body_of
from recray.serving.schemas import (
    ERRORS,
    Items,
    Problem,
    RecommendRequest,
    ScoreRequest,
    Scores,
    SimilarRequest,
)
from recray.serving.service import Overloaded, Service

_BEARER = HTTPBearer(auto_error=False)


def create_app(service: Service, token: str | None = None, poll: float = 5.0) -> Door:
    """token: what requests must bring as `Authorization: Bearer TOKEN`; None: nothing. poll: see Service.start."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        service.start(poll)
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(title="recray", version=recray.__version__, lifespan=life)
    metrics = Metrics(service)
    _errors(app)
    _probes(app, service, metrics)
    _questions(app, service)
    return Door(app, service, metrics, token)


def _errors(app: FastAPI) -> None:
    @app.exception_handler(pydantic.ValidationError)
    async def wrong(_: Request, error: Exception) -> Response:
        # Without the input, which may be no valid JSON: NaN.
        assert isinstance(error, pydantic.ValidationError)
        found = error.errors(include_url=False, include_context=False, include_input=False)
        listed = [{"where": ".".join(("body", *map(str, one["loc"]))), "problem": one["msg"]} for one in found]
        return JSONResponse({"detail": listed}, 422)

    @app.exception_handler(DataError)
    async def unknown(_: Request, error: Exception) -> Response:
        return Response(body_of(str(error)), 422, media_type="application/json")

    @app.exception_handler(Overloaded)
    async def late(_: Request, error: Exception) -> Response:
        return Response(body_of(str(error)), 429, {"Retry-After": "1"}, media_type="application/json")


def _probes(app: FastAPI, service: Service, metrics: Metrics) -> None:
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


def _questions(app: FastAPI, service: Service) -> None:
    async def ask(http: Request, group: tuple[Any, ...], request: Any, answer: answers.Answer) -> Response:
        identity, found = await asyncio.wrap_future(service.submit(group, request, answer))
        state = http.scope["state"]
        state["model"] = identity
        body = json.dumps({"model": identity, "request": state["request"], **found}, allow_nan=False)
        return Response(body, media_type="application/json")

    async def recommend(http: Request, body: RecommendRequest) -> Response:
        """The best items for a user or a history. Unknown users and empty histories get popular items with score null."""
        return await ask(http, answers.group_of(body), body, answers.recommend)

    async def score(http: Request, body: ScoreRequest) -> Response:
        """The probability that each row's item is chosen, by the ranker that is served."""
        return await ask(http, ("score",), body, answers.score)

    async def similar(http: Request, body: SimilarRequest) -> Response:
        """The items whose vectors are nearest to the item's, by cosine."""
        return await ask(http, ("similar",), body, answers.similar)

    for endpoint, model, found in (
        (recommend, RecommendRequest, Items),
        (score, ScoreRequest, Scores),
        (similar, SimilarRequest, Items),
    ):
        app.router.add_api_route(
            f"/{endpoint.__name__}",
            endpoint,
            methods=["POST"],
            responses={200: {"model": found}, **ERRORS},
            response_class=Response,
            response_model=None,
            dependencies=[Depends(_BEARER)],  # for the page: the door checks the token
            route_class_override=_validated_by(model),
        )


def _validated_by(model: type[pydantic.BaseModel]) -> type[APIRoute]:
    """A route whose body is parsed and validated in one pass, and whose response is sent as it is. FastAPI's own way takes
    several times longer than a small model; it still writes the OpenAPI page from the endpoint's signature."""

    class Validated(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            endpoint = self.endpoint

            async def handle(http: Request) -> Response:
                answer: Response = await endpoint(http, model.model_validate_json(await http.body()))
                return answer

            return handle

    return Validated
