"""Connecting to Ray and checking its resources, with `ray.init` replaced: nothing is started."""

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from recray.cluster import cpus, private_ray, resources, runtime
from recray.config import ScalingConfig
from recray.errors import ClusterError, ResourceError

ray = pytest.importorskip("ray")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every call of ray.init."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: bool(calls))
    monkeypatch.setattr(ray, "init", lambda **options: calls.append(options))
    monkeypatch.setattr(
        ray, "get_runtime_context", lambda: SimpleNamespace(get_session_name=lambda: "session_of_a_test")
    )
    monkeypatch.setattr(resources, "of_nodes", lambda: [{"CPU": float(calls[0].get("num_cpus", 2))}])
    monkeypatch.setattr(resources, "autoscales", lambda: False)
    monkeypatch.setattr(runtime, "quieten_data", lambda: None)
    monkeypatch.setattr(runtime, "_own", False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return calls


GRPC, WEB = bytes((0, 0, 6, 4, 0, 0, 0, 0, 0)), b"HTTP/1.1 400 Bad Request\r\n\r\n"


@contextlib.contextmanager
def _listening(answer: bytes) -> Iterator[int]:
    """The port of a server that answers every connection so; with nothing it keeps silent."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []

        def serve() -> None:
            with contextlib.suppress(OSError):  # closed
                while True:
                    held.append(server.accept()[0])
                    held[-1].sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        for connection in held:
            connection.close()


@pytest.fixture
def head(started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A port that answers as gRPC does, and RAY_ADDRESS set to it."""
    with _listening(GRPC) as port:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        yield


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_local_ray_has_cpus_for_reading_in_addition_to_the_workers(started: list[dict[str, Any]]) -> None:
    runtime.start(ScalingConfig(num_workers=100, cpus_per_worker=3))
    assert started[0]["num_cpus"] > 300
    assert started[0]["include_dashboard"] is False
    assert started[0]["address"] == "local"  # never a cluster that `ray start` left on this machine


@pytest.mark.parametrize("address", [None, "", "local"])
def test_without_an_address_ray_is_local_and_starts_once(
    started: list[dict[str, Any]], address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert not runtime.is_shared()
    runtime.start(ScalingConfig())
    runtime.start(ScalingConfig())
    assert len(started) == 1 and runtime.is_own() and not runtime.is_shared()


def test_a_local_ray_starts_on_loopback_and_a_cluster_is_joined_through_its_network(
    started: list[dict[str, Any]], head: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private import ray_constants, services

    addresses: list[str] = []
    monkeypatch.setattr(ray, "init", lambda **options: addresses.append(services.get_node_ip_address()))
    monkeypatch.setattr(ray._private.worker, "_global_node", None)  # that of the session's Ray
    monkeypatch.setattr(services, "node_ip_address_from_perspective", lambda address: "192.0.2.7")
    for name in runtime.loopback():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    runtime.connect()
    assert not runtime.loopback().keys() & os.environ.keys()
    monkeypatch.setenv("RAY_ADDRESS", "local")
    runtime.connect()
    assert addresses == ["192.0.2.7", "127.0.0.1"]
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert ray_constants.ENABLE_RAY_CLUSTER is True  # as it was


@pytest.mark.usefixtures("head")
def test_a_cluster_is_joined_as_it_is(started: list[dict[str, Any]]) -> None:
    runtime.start(ScalingConfig())
    assert "num_cpus" not in started[0] and not runtime.is_own() and runtime.is_shared()
    assert started[0]["runtime_env"] == {"env_vars": cpus.waiting()}  # nodes may not have them


@pytest.mark.usefixtures("head")
def test_a_job_keeps_the_variables_that_it_was_submitted_with(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray refuses to merge two settings of one variable."""
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"env_vars": cpus.waiting()}}))
    runtime.connect()
    assert started[0]["runtime_env"] is None


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "ray://localhost:{port}"])
def test_a_cluster_that_is_gone_is_an_error_at_once(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address.format(port=_closed_port()))
    before = time.monotonic()
    with pytest.raises(ClusterError, match=r"cannot join a Ray cluster at RAY_ADDRESS = .*refused.*`ray status`"):
        runtime.start(ScalingConfig())
    assert time.monotonic() - before < 10


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize(
    ("answer", "message"), [(b"", "does not answer within 0.5 s"), (WEB, "is no head node of Ray")]
)
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_what_listens_and_is_no_ray(answer: bytes, message: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_CONNECT_SECONDS", 0.5)
    with _listening(answer) as port:
        monkeypatch.setenv("RAY_ADDRESS", f"{scheme}127.0.0.1:{port}")
        with pytest.raises(ClusterError, match=rf"cannot join a Ray cluster at RAY_ADDRESS = .*{message}"):
            runtime.check()


@pytest.mark.usefixtures("started")
def test_a_name_that_takes_for_ever_to_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: released.wait(60))
    monkeypatch.setattr(runtime, "_CONNECT_SECONDS", 0.2)
    monkeypatch.setenv("RAY_ADDRESS", "head.example:6379")
    with pytest.raises(ClusterError, match=r"head\.example:6379 does not answer within 0\.2 s"):
        runtime.check()
    released.set()


@pytest.mark.usefixtures("started")
def test_a_temporary_folder_too_deep_for_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", f"/tmp/{'x' * 60}")
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    with pytest.raises(
        ClusterError, match=r"TMPDIR = /tmp/xx.* at most 107 bytes: set RAY_TMPDIR to a folder of at most 3\d"
    ):
        runtime.connect()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    runtime.connect()
    assert runtime.is_own()


@pytest.mark.usefixtures("started")
def test_auto_finds_a_cluster_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed `ray start` leaves in /tmp/ray."""
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(private_ray, "find_address", lambda: f"127.0.0.1:{_closed_port()}")
    with pytest.raises(ClusterError, match=r"RAY_ADDRESS = auto .*refused"):
        runtime.connect()


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize("address", ["nonsense", "http://127.0.0.1:8265", "127.0.0.1:x", "ray://", "10.0.0.1:99999"])
def test_an_address_that_is_none_is_an_error(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match=rf"RAY_ADDRESS = {address} does not name a Ray cluster: use HOST:PORT"):
        runtime.connect()


@pytest.mark.usefixtures("started", "head")
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("InvalidAuthToken"), "the token is not the cluster's: set RAY_AUTH_TOKEN"),
        (RuntimeError("Version mismatch: the cluster was started with Ray 2.1"), "was started with Ray 2.1"),
        (ValueError("Invalid address format"), "check the address"),
    ],
)
def test_a_refusal_of_ray_is_a_cluster_error(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ClusterError, match=message):
        runtime.connect()


@pytest.mark.usefixtures("started")
def test_a_local_ray_that_does_not_start_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_out(**options: Any) -> None:
        raise Exception("The current node timed out during startup.")

    shutdowns: list[bool] = []
    monkeypatch.setattr(ray, "init", time_out)
    monkeypatch.setattr(ray, "shutdown", lambda: shutdowns.append(True))  # what did start is stopped again
    with pytest.raises(
        ClusterError, match=r"Ray did not start on this machine: .* timed out .*scaling.num_workers = 0"
    ):
        runtime.connect()
    assert not runtime.is_own() and shutdowns == [True] * 3


def test_a_local_ray_that_starts_slowly_is_tried_again(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    start, tries = ray.init, iter([Exception("The current node timed out during startup."), None])

    def init(**options: Any) -> None:
        if error := next(tries):
            raise error
        start(**options)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    runtime.connect()
    assert runtime.is_own() and len(started) == 1


@pytest.mark.usefixtures("started")
def test_a_gpu_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match=r"scaling\.use_gpu = true.*no GPU"):
        runtime.start(ScalingConfig(use_gpu=True))
    monkeypatch.setattr(resources, "of_nodes", lambda: [{"CPU": 2.0, "GPU": 1.0}])
    runtime.start(ScalingConfig(use_gpu=True))
    with pytest.raises(ResourceError, match=r"num_workers = 2 with 1 GPU and 1 CPU each, but only 1 of them"):
        runtime.start(ScalingConfig(use_gpu=True, num_workers=2))


@pytest.mark.usefixtures("started", "head")
def test_more_workers_than_a_cluster_has_cpus_are_refused() -> None:
    with pytest.raises(
        ResourceError, match=r"num_workers = 3 with 2 CPUs each, but only 1 .* \(2 CPUs, 0 GPUs, 1 node;"
    ):
        runtime.start(ScalingConfig(num_workers=3, cpus_per_worker=2))
    runtime.start(ScalingConfig(num_workers=0, cpus_per_worker=2))


@pytest.mark.usefixtures("started")
def test_workers_that_fit_on_no_node_are_refused_unless_the_cluster_autoscales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "of_nodes", lambda: [{"CPU": 3.0}, {"CPU": 3.0}])
    runtime.start(ScalingConfig(num_workers=2, cpus_per_worker=3))
    with pytest.raises(
        ResourceError, match=r"num_workers = 3 with 2 CPUs each, but only 2 of them .*6 CPUs, 0 GPUs, 2 nodes;"
    ):
        runtime.start(ScalingConfig(num_workers=3, cpus_per_worker=2))
    monkeypatch.setattr(resources, "autoscales", lambda: True)
    runtime.start(ScalingConfig(num_workers=3, cpus_per_worker=2, use_gpu=True))


@pytest.mark.usefixtures("started")
def test_a_cluster_without_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "of_nodes", lambda: [{"GPU": 1.0}])
    with pytest.raises(ResourceError, match=r"no CPU, and data tasks need one"):
        runtime.start(ScalingConfig(num_workers=0))


def test_a_ray_without_the_private_names_waits_instead_of_refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("ray.autoscaler.v2.utils", "ray._private.services"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it raises ImportError
    assert private_ray.autoscales()
    assert private_ray.find_address() is None


class PlacementGroupCleanerCallback: ...


class _Trainer:
    def _create_default_callbacks(self) -> list[object]:
        return [1, PlacementGroupCleanerCallback(), 2]


def test_a_local_trainer_starts_without_the_cleaner() -> None:
    trainer = _Trainer()
    private_ray.drop_placement_group_cleaner(trainer)
    assert trainer._create_default_callbacks() == [1, 2]
    private_ray.drop_placement_group_cleaner(object())  # another version of Ray: nothing to change
    ray_train = pytest.importorskip("ray.train.torch")
    real = ray_train.TorchTrainer(lambda: None)
    before = [type(one).__name__ for one in real._create_default_callbacks()]
    private_ray.drop_placement_group_cleaner(real)
    after = [type(one).__name__ for one in real._create_default_callbacks()]
    assert after == [name for name in before if name != "PlacementGroupCleanerCallback"] and len(after) > 1


@pytest.mark.parametrize(
    ("free", "lacking"),
    [
        ({"CPU": 8.0}, "2 GPUs"),
        ({"CPU": 3.0, "GPU": 1.5}, "0.5 GPUs, 1 CPU"),
        ({"CPU": 8.0, "GPU": 2.0}, "a node with 1 GPU, 2 CPUs"),
    ],
)
def test_missing_resources_are_named(free: dict[str, float], lacking: str) -> None:
    assert resources.short([{"GPU": 1.0, "CPU": 2.0}] * 2, free) == lacking


class _Group:
    """A placement group that is placed at the second call of wait."""

    def __init__(self, bundles: list[dict[str, float]]) -> None:
        self.waits = 0

    def wait(self, seconds: float) -> bool:
        self.waits += 1
        return self.waits > 1


def test_waiting_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    module = pytest.importorskip("ray.util.placement_group")
    removed: list[Any] = []
    monkeypatch.setattr(module, "placement_group", _Group)
    monkeypatch.setattr(module, "remove_placement_group", removed.append)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(resources, "autoscales", lambda: False)
    monkeypatch.setattr(resources, "of_nodes", lambda: [{"CPU": 8.0, "GPU": 2.0, "object_store_memory": 2.0**30}] * 2)
    with caplog.at_level(logging.INFO, "recray"):
        resources.wait_for_workers(ScalingConfig(num_workers=2, cpus_per_worker=4, use_gpu=True))
    plan, waiting, available = (record.getMessage() for record in caplog.records)
    assert plan == (
        "cluster: plan: 2 training workers with 1 GPU and 4 CPUs each; 8 CPUs left for data; object store 2.0 GiB on 2 nodes"
    )
    assert waiting.startswith("cluster: waiting for 6 CPUs, 2 GPUs: in use by other jobs; 0 of at most ")
    assert available == "cluster: resources available after 0 s"
    assert len(removed) == 1


def test_waiting_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("ray.util.placement_group")
    monkeypatch.setattr(_Group, "wait", lambda self, seconds: False)
    monkeypatch.setattr(module, "placement_group", _Group)
    monkeypatch.setattr(module, "remove_placement_group", lambda group: None)
    monkeypatch.setattr(ray, "available_resources", lambda: {})
    with pytest.raises(
        ResourceError, match=r"1 GPU not available after 0 s \(scaling.wait_seconds = 0\): see `ray status`"
    ):
        resources.wait([{"GPU": 1.0}], 0)
