"""`recray serve` over a real loopback socket: answers, errors, a swap under load, and what happens when it is too much."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import recray
from helpers.product_log import make_product_runs, product_config
from recray.errors import ConfigError
from recray.inference import LoadedRetriever
from recray.inference.export import export

pytest.importorskip("faiss")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from recray.serving.app import create_app  # noqa: E402
from recray.serving.server import TOKEN, check  # noqa: E402
from recray.serving.service import Service  # noqa: E402

Answer = tuple[int, Any]


class Client:
    """Requests to a port of this machine, one connection for each thread."""

    def __init__(self, port: int, token: str = "") -> None:
        self.port, self._local = port, threading.local()
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def call(
        self, method: str, path: str, body: bytes | str | None = None, headers: dict[str, str] | None = None
    ) -> Answer:
        if not hasattr(self._local, "connection"):
            self._local.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        self._local.connection.request(method, path, body, {**self._headers, **(headers or {})})
        found = self._local.connection.getresponse()
        text = found.read()
        is_json = found.getheader("content-type", "").startswith("application/json")
        return found.status, json.loads(text) if is_json else text.decode()

    def post(self, path: str, **body: Any) -> Answer:
        return self.call("POST", path, json.dumps(body), {"Content-Type": "application/json"})


@contextlib.contextmanager
def serving(service: Service, token: str | None = None, poll: float = 0.0) -> Iterator[Client]:
    app = create_app(service, token, poll)
    # On a busy machine two requests of a test may be further apart than the 5 s that uvicorn waits for the next one.
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False, timeout_keep_alive=75))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        yield Client(server.servers[0].sockets[0].getsockname()[1], token or "")
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A promoted run of two towers with DIN behind them, and its bundle."""
    folder = tmp_path_factory.mktemp("serving")
    make_product_runs(folder, ("two_tower", "din"))
    config = product_config(folder, "two_tower", f"retrieval.ranker={folder}/runs/din")
    recray.promote(config, force=True)
    export(config.run_uri, str(folder / "bundle"))
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    with serving(Service(str(folder / "bundle"), wait=30, timeout=30)) as found:
        yield found


def test_answers_are_those_of_python(folder: Path, client: Client) -> None:
    model = recray.load(str(folder / "runs" / "two_tower"))
    assert isinstance(model, LoadedRetriever)
    users = [f"u{number}" for number in range(80)] * 3
    expected = model.recommend(users=users[:80], k=7).to_pandas().groupby("user", sort=False)["item"].agg(list)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda user: client.post("/recommend", user=user, k=7), users))
    assert {status for status, _ in found} == {200}
    for user, (_, answer) in zip(users, found, strict=True):
        assert [one["item"] for one in answer["items"]] == expected[user]
        assert answer["model"] == model.identity
    assert len({answer["request"] for _, answer in found}) == len(users)
    _, text = client.call("GET", "/metrics")
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures['recray_requests_total{path="/recommend",status="200"}']) >= 240
    assert float(figures["recray_batch_size_sum"]) > float(figures["recray_batch_size_count"])  # some were batches
    assert figures[f'recray_model{{identity="{model.identity}"}}'] == "1.0"


def test_histories_context_and_strangers(folder: Path, client: Client) -> None:
    model = recray.load(str(folder / "runs" / "two_tower"))
    assert isinstance(model, LoadedRetriever) and model.ranker is not None
    context = {"device": "phone", "minutes": 3.5, "price.usd": None, "shop": 4}
    own = {"tags": ["t1", "t2"], "age": 50}
    status, found = client.post("/recommend", history=["i003", "i004", "new"], context=context, user_features=own, k=5)
    expected = model.recommend(
        history=[["i003", "i004", "new"]], context=context, user_features=own | {"tags": [own["tags"]]}, k=5
    )
    assert status == 200 and [one["item"] for one in found["items"]] == expected["item"].to_pylist()
    assert [one["score"] for one in found["items"]] == pytest.approx(expected["score"].to_pylist(), abs=1e-5)
    popular = client.post("/recommend", user="nobody", k=3)[1]["items"]
    assert len(popular) == 3 and {one["score"] for one in popular} == {None}
    assert popular == client.post("/recommend", history=[], k=3)[1]["items"]
    rest = client.post("/recommend", user="nobody", k=3, exclude=[popular[0]["item"]])[1]["items"]
    assert rest[:2] == popular[1:]
    everything = [f"i{number:03}" for number in range(60)]
    assert client.post("/recommend", user="u1", exclude=everything)[1]["items"] == []
    seen = client.post("/recommend", history=["i003"], k=60, exclude_seen=False)[1]["items"]
    assert "i003" in [one["item"] for one in seen]

    rows = [{"user": "u1", "item": "i005", "context": {"device": "tv"}}, {"history": ["i001"], "item": "i006"}]
    status, found = client.post("/score", rows=rows)
    first = model.ranker.score([{"user_id": "u1", "item_id": "i005", "device": "tv"}])
    second = model.ranker.score([{"item_id": "i006", "history": ["i001"]}])
    assert status == 200 and found["scores"] == pytest.approx([first[0], second[0]], abs=1e-5)
    status, found = client.post("/similar", item="i005", k=3)
    assert (
        status == 200 and [one["item"] for one in found["items"]] == model.similar_items("i005", 3)["item"].to_pylist()
    )


def test_filters_caps_and_titles(folder: Path, client: Client) -> None:
    goods = pd.read_parquet(folder / "items.parquet").set_index("item_id")
    wanted = {"genres": ["g1", "g3"], "weight": {"min": -0.5}}
    passes = goods[goods.genres.map(lambda one: bool({"g1", "g3"} & set(one))) & (goods.weight >= -0.5)]
    model = recray.load(str(folder / "runs" / "two_tower"))
    assert isinstance(model, LoadedRetriever)
    people: list[dict[str, Any]] = [{"user": "u5"}, {"history": ["i003", "i004"]}, {"user": "nobody"}]
    for who in people:
        status, found = client.post("/recommend", **who, filters=wanted, k=60)
        users, history = ([who[name]] if name in who else None for name in ("user", "history"))
        expected = model.recommend(users, history, filters=wanted, k=60).to_pylist()
        assert status == 200 and [one["item"] for one in found["items"]] == [one["item"] for one in expected]
        assert len(expected) > 3 and {one["item"] for one in expected} <= set(passes.index)
        for one, mine in zip(found["items"], expected, strict=True):
            title = goods.title[one["item"]]
            assert one["title"] == mine["title"] == title or (title is None and one["title"] is None)
    everything = client.post("/recommend", user="u5", k=20)[1]["items"]
    few = client.post("/recommend", user="u5", k=20, caps={"title": 1})[1]["items"]
    assert [one["item"] for one in few] == [one["item"] for one in everything]
    assert client.post("/similar", item="i003", k=3)[1]["items"][0]["title"].startswith("Item")
    none = client.post("/recommend", user="u5", filters={"genres": ["no such"]})
    assert none[0] == 200 and none[1]["items"] == []


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/recommend", {}, 422, "give either `user` or `history`"),
        ("/recommend", {"user": "u1", "history": []}, 422, "give either `user` or `history`"),
        ("/recommend", {"user": 5}, 422, "user keys of the dataset are string, and 5 is not"),
        ("/recommend", {"user": 2**70}, 422, "less than or equal to"),
        ("/recommend", {"user": "u1", "k": 0}, 422, "greater than or equal to 1"),
        ("/recommend", {"user": "u1", "kk": 3}, 422, "Extra inputs are not permitted"),
        ("/recommend", {"history": ["i001", 2]}, 422, "item keys of the dataset are string"),
        (
            "/recommend",
            {"user": "u1", "context": {"hour": 3}},
            422,
            "no context feature 'hour'; it has: device, minutes",
        ),
        ("/recommend", {"user": "u1", "context": {"minutes": "x"}}, 422, "'minutes' has values of type double"),
        ("/recommend", {"user": "u1", "user_features": {"tags": "t1"}}, 422, "'tags' has values of type list<"),
        ("/recommend", {"user": "\ud800"}, 422, "Invalid JSON"),
        ("/score", {"rows": []}, 422, "at least 1 item"),
        (
            "/score",
            {"rows": [{"user": "u1", "item": "i001", "context": {"hour": 1}}]},
            422,
            "no context feature 'hour'",
        ),
        ("/score", {"rows": [{"user": "u1", "item": "i001"}, {"user": "u2", "item": 2}]}, 422, "are not of one type"),
        ("/similar", {"item": "no such item"}, 422, "does not know 1 of 1 items, such as 'no such item'"),
        ("/recommend", {"user": "u1", "filters": {"colour": ["red"]}}, 422, "no feature 'colour'; they have: genres"),
        (
            "/recommend",
            {"user": "u1", "filters": {"weight": ["x"]}},
            422,
            "cannot be compared with values of type double",
        ),
        ("/recommend", {"user": "u1", "filters": {"weight": {}}}, 422, "give `min`, `max` or both"),
        ("/recommend", {"user": "u1", "caps": {"genres": 1}}, 422, "'genres' holds lists"),
        ("/nothing", {}, 404, "Not Found"),
    ],
)
def test_what_is_wrong_is_said(client: Client, path: str, body: dict[str, Any], status: int, message: str) -> None:
    found, answer = client.post(path, **body)
    assert found == status and message in json.dumps(answer)


def test_malformed_bodies_and_headers(client: Client) -> None:
    for body in (
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 50_000,
        b"null",
        b'{"user": NaN}',
        b'{"user": "u1", "context": {"minutes": Infinity}}',
    ):
        status, _ = client.call("POST", "/recommend", body, {"Content-Type": "application/json"})
        assert status == 200 if b"Infinity" in body else 400 <= status < 500, body[:20]
    assert client.call("GET", "/recommend")[0] == 405
    assert client.post("/recommend", history=["x" * 900] * 2000)[0] == 413
    plain = client.call("POST", "/recommend", b'{"user": "u1"}', {"Content-Type": "text/plain"})
    assert plain[0] == 415 and "application/json" in plain[1]["detail"]


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["u1", "i001", "phone"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
_NAMES = (
    "user",
    "history",
    "context",
    "user_features",
    "k",
    "exclude",
    "exclude_seen",
    "item",
    "rows",
    "filters",
    "caps",
)
_FEATURES = (
    "device",
    "query",
    "shop",
    "minutes",
    "price.usd",
    "country",
    "tags",
    "age",
    "genres",
    "weight",
    "min",
    "max",
)
_ROW = st.dictionaries(st.sampled_from(_NAMES), _JSON | st.dictionaries(st.sampled_from(_FEATURES), _JSON), max_size=5)
_BODY = _ROW | st.fixed_dictionaries({"rows": st.lists(_ROW, max_size=3)}) | _JSON


@settings(
    max_examples=int(os.environ.get("RECRAY_FUZZ", 300)),
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(path=st.sampled_from(["/recommend", "/score", "/similar"]), body=_BODY)
def test_no_body_is_an_error_of_the_server(client: Client, path: str, body: Any) -> None:
    status, answer = client.call("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    assert status < 500, answer
    assert status == 200 or answer["detail"]


def test_a_promotion_is_swapped_in_under_load(folder: Path) -> None:
    run = str(folder / "runs" / "two_tower")
    before = recray.load(run)
    new = product_config(folder, "two_tower", "optim.learning_rate=0.05")
    recray.train(new)
    recray.index(new)
    service = Service(run, wait=30, timeout=30)
    swapped = threading.Event()

    def ask(number: int) -> list[tuple[str, Answer]]:
        found, later = [], 0
        while later < 5:  # some requests after the swap, too
            user = f"u{(number + 7 * len(found)) % 80}"
            found.append((user, client.post("/recommend", user=user, k=5)))
            later += swapped.is_set()
        return found

    with serving(service) as client, ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(ask, number) for number in range(8)]
        assert client.call("GET", "/ready")[1]["model"] == before.identity
        recray.promote(new, force=True)
        assert service.swap()
        swapped.set()
        answers = [one for future in futures for one in future.result()]
        assert not service.swap()
    after = recray.load(run)
    models = {one.identity: one for one in (before, after)}
    assert len(models) == 2 and {answer["model"] for _, (_, answer) in answers} == models.keys()
    lists = {
        name: one.recommend(users=[f"u{n}" for n in range(80)], k=5).to_pandas().groupby("user")["item"].agg(list)
        for name, one in models.items()
        if isinstance(one, LoadedRetriever)
    }
    for user, (status, answer) in answers:
        assert status == 200
        assert [one["item"] for one in answer["items"]] == lists[answer["model"]][user]

    served = folder / "runs" / "two_tower" / "served.json"
    whole = served.read_text()
    with serving(service := Service(run), poll=0.01) as client:
        served.write_text(whole[:40])
        while not service.failures:
            assert client.post("/recommend", user="u1")[0] == 200
        served.write_text(whole)
        assert client.post("/recommend", user="u1")[1]["model"] == after.identity


def test_more_requests_than_it_can_answer_are_refused_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(str(folder / "bundle"), wait=0.05, timeout=30, batch=1)
    begun, go = threading.Event(), threading.Event()
    model = service.loaded.model
    assert isinstance(model, LoadedRetriever)
    similar = model.similar_items

    def slow(item: Any, k: int) -> Any:
        begun.set()
        assert go.wait(30)
        return similar(item, k)

    monkeypatch.setattr(model, "similar_items", slow)
    with serving(service) as client, ThreadPoolExecutor(4) as pool:
        first = pool.submit(client.post, "/similar", item="i001")
        assert begun.wait(30)
        service.fixed, service.each = 0.0, 0.012  # after the one that is being answered, three are 48 ms
        waiting = [pool.submit(client.post, "/similar", item="i001") for _ in range(3)]
        while service.admitted < 4:
            pass
        status, answer = client.post("/recommend", user="u1")
        assert status == 429 and "try again" in answer["detail"]
        assert client.call("GET", "/health")[0] == 200  # probes do not wait
        go.set()
        assert [one.result()[0] for one in (first, *waiting)] == [200] * 4
        service.timeout = -1.0  # one that waited too long is refused when its turn comes
        assert client.post("/recommend", user="u1")[0] == 429


def test_how_long_batches_take_is_learned(folder: Path) -> None:
    service = Service(str(folder / "bundle"), wait=0.05)
    for at in range(2000):
        size = 1 + at % 9
        service._learn(size, 5.0 if at % 100 == 0 else 0.004 + 0.0015 * size)
    service._learn(9, 0.004 + 0.0015 * 9)
    for size in (1, 9):
        assert service._seconds(size) == pytest.approx(0.004 + 0.0015 * size, rel=0.2)


def test_others_need_a_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    assert check("127.0.0.1") is None and check("::1") is None and check("localhost") is None
    with pytest.raises(ConfigError, match="reachable from other machines: set RECRAY_SERVE_TOKEN"):
        check("0.0.0.0")
    monkeypatch.setenv(TOKEN, "a long word")
    assert check("0.0.0.0") == "a long word"
    with serving(Service(str(folder / "bundle")), token="a long word") as client:
        assert client.post("/recommend", user="u1")[0] == 200
        for wrong in ("", "another", "ä"):
            stranger = Client(client.port, wrong.encode().decode("latin-1"))
            status, answer = stranger.post("/recommend", user="u1")
            assert status == 401 and "Authorization: Bearer TOKEN" in answer["detail"]
        assert Client(client.port).call("GET", "/ready")[0] == 200


def test_a_ranker_alone_scores_and_finds_nothing(folder: Path) -> None:
    with serving(Service(str(folder / "runs" / "din"))) as client:
        assert client.post("/score", rows=[{"user": "u1", "item": "i001"}])[0] == 200
        status, answer = client.post("/recommend", user="u1")
        assert status == 422 and "POST /score" in answer["detail"]
        schema = client.call("GET", "/openapi.json")[1]
    assert {"/recommend", "/score", "/similar", "/health", "/ready", "/metrics"} == schema["paths"].keys()
