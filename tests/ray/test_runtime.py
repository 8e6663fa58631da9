"""runtime without starting Ray: `ray` is replaced where it is asked."""

from typing import Any

import pytest

from recray.cluster import resources, runtime
from recray.config import ScalingConfig
from recray.errors import ResourceError

ray = pytest.importorskip("ray")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls of ray.init, none of which starts anything."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: bool(calls))
    monkeypatch.setattr(ray, "init", lambda **options: calls.append(options))
    monkeypatch.setattr(resources, "_nodes", lambda: [{"CPU": float(calls[0].get("num_cpus", 2))}])
    monkeypatch.setattr(resources, "autoscales", lambda: False)
    monkeypatch.setattr(runtime, "quieten_data", lambda: None)
    monkeypatch.setattr(runtime, "_own", False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return calls


def test_a_local_ray_has_cpus_for_reading_beside_the_workers(started: list[dict[str, Any]]) -> None:
    runtime.start(ScalingConfig(num_workers=100, cpus_per_worker=3))
    assert started[0]["num_cpus"] > 300
    assert started[0]["include_dashboard"] is False
    assert started[0]["address"] == "local"  # whatever `ray start` left on this machine


def test_starting_again_does_nothing(started: list[dict[str, Any]]) -> None:
    runtime.start(ScalingConfig())
    runtime.start(ScalingConfig())
    assert len(started) == 1 and runtime.is_own()


def test_a_given_cluster_is_joined_not_shaped(started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    runtime.start(ScalingConfig())
    assert "num_cpus" not in started[0] and not runtime.is_own()


@pytest.mark.usefixtures("started")
def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match=r"scaling\.use_gpu = true.*no GPU"):
        runtime.start(ScalingConfig(use_gpu=True))
    monkeypatch.setattr(resources, "_nodes", lambda: [{"CPU": 2.0, "GPU": 1.0}])
    runtime.start(ScalingConfig(use_gpu=True))
    with pytest.raises(ResourceError, match=r"num_workers = 2 with one GPU each, but this Ray cluster has 1"):
        runtime.start(ScalingConfig(use_gpu=True, num_workers=2))


@pytest.mark.usefixtures("started")
def test_more_workers_than_a_cluster_has_cpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(
        ResourceError, match=r"\(3\) x scaling.cpus_per_worker \(2\) = 6 CPUs, but this Ray cluster has 2"
    ):
        runtime.start(ScalingConfig(num_workers=3, cpus_per_worker=2))
    runtime.start(ScalingConfig(num_workers=0, cpus_per_worker=2))


@pytest.mark.usefixtures("started")
def test_workers_that_fit_on_no_node_are_refused_unless_the_cluster_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_nodes", lambda: [{"CPU": 3.0}, {"CPU": 3.0}])
    runtime.start(ScalingConfig(num_workers=2, cpus_per_worker=3))
    with pytest.raises(ResourceError, match=r"num_workers = 3 with 2 CPUs each, but only 2 of them fit on the 2 nodes"):
        runtime.start(ScalingConfig(num_workers=3, cpus_per_worker=2))
    monkeypatch.setattr(resources, "autoscales", lambda: True)
    runtime.start(ScalingConfig(num_workers=3, cpus_per_worker=2, use_gpu=True))


@pytest.mark.usefixtures("started")
def test_a_cluster_without_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_nodes", lambda: [{"GPU": 1.0}])
    with pytest.raises(ResourceError, match=r"no CPU, and data tasks need one"):
        runtime.start(ScalingConfig(num_workers=0))


@pytest.mark.parametrize(
    ("free", "lacking"),
    [
        ({"CPU": 8.0}, "2 GPU"),
        ({"CPU": 3.0, "GPU": 1.5}, "0.5 GPU, 1 CPU"),
        ({"CPU": 8.0, "GPU": 2.0}, "a node with 1 GPU, 2 CPU"),
    ],
)
def test_what_is_short_is_named(free: dict[str, float], lacking: str) -> None:
    assert resources.short([{"GPU": 1.0, "CPU": 2.0}] * 2, free) == lacking
