"""What every request passes: its id, the checks that need no body, admission, metrics and the log."""

from __future__ import annotations

import json
import secrets
import time
import uuid

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recray import log
from recray.serving.service import BUSY, Service

_BODY = 1 << 20  # bytes
_PATHS = frozenset(("/recommend", "/score", "/similar", "/health", "/ready", "/metrics", "/docs", "/openapi.json"))


class Metrics:
    """For Prometheus."""

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
        waiting = Gauge("recray_waiting", "Requests that were admitted and not answered yet", registry=self.registry)
        waiting.set_function(lambda: service.admitted)
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


class Door:
    """The ASGI application around that of FastAPI, so that a request that is refused costs little: overload is shed."""

    def __init__(self, app: ASGIApp, service: Service, metrics: Metrics, token: str | None) -> None:
        self._app, self._service, self._metrics = app, service, metrics
        self._bearer = None if token is None else f"bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500
        state = scope.setdefault("state", {})
        state["request"] = uuid.uuid4().hex

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if scope["method"] != "POST":
                await self._app(scope, receive, watched)
            elif (refusal := self._refusal(scope)) is not None:
                await _refuse(watched, *refusal)
            else:
                self._service.admitted += 1
                try:
                    await self._app(scope, receive, watched)
                finally:
                    self._service.admitted -= 1
        finally:
            self._record(scope, status, time.perf_counter() - started)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if self._bearer is not None and not _same(headers.get(b"authorization", b""), self._bearer):
            return 401, "send the token as `Authorization: Bearer TOKEN`"
        size = headers.get(b"content-length", b"")
        if not size.isdigit():
            return 411, "send Content-Length"
        if len(size) > 10 or int(size) > _BODY:
            return 413, f"the body has {size[:30].decode()} bytes, at most {_BODY} are allowed"
        # A page of another origin can send text/plain to a server on loopback without asking; JSON it cannot.
        if headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
            return 415, "send JSON with `Content-Type: application/json`"
        return None if self._service.admits() else (429, BUSY)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"] if scope["path"] in _PATHS else "other"
        self._metrics.requests.labels(path, status).inc()
        self._metrics.seconds.labels(path).observe(seconds)
        state = scope["state"]
        values = {"request": state["request"], "path": path, "status": status, "seconds": round(seconds, 5)}
        values["model"] = state.get("model", "")
        log.info("serve", f"{path} {status} {1000 * seconds:.1f} ms", event="request", values=values)


def body_of(detail: str) -> bytes:
    """The JSON of a problem."""
    return json.dumps({"detail": detail.encode(errors="replace").decode()}).encode()


def _same(given: bytes, wanted: bytes) -> bool:
    scheme, _, word = given.partition(b" ")
    return secrets.compare_digest(scheme.lower() + b" " + word.strip(), wanted)


async def _refuse(send: Send, status: int, detail: str) -> None:
    body = body_of(detail)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += {429: [(b"retry-after", b"1")], 401: [(b"www-authenticate", b"Bearer")]}.get(status, [])
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
