"""runtime without starting Ray: `ray` is replaced where it is asked."""

from typing import Any

import pytest

from recray import runtime
from recray.config import ScalingConfig
from recray.errors import ResourceError

ray = pytest.importorskip("ray")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls of ray.init, none of which starts anything."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: bool(calls))
    monkeypatch.setattr(ray, "init", lambda **options: calls.append(options))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(calls[0].get("num_cpus", 2))})
    monkeypatch.setattr(runtime, "quieten_data", lambda: None)
    monkeypatch.setattr(runtime, "_own", False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return calls


def test_a_local_ray_has_cpus_for_reading_beside_the_workers(started: list[dict[str, Any]]) -> None:
    runtime.start(ScalingConfig(num_workers=100, cpus_per_worker=3))
    assert started[0]["num_cpus"] > 300
    assert started[0]["include_dashboard"] is False


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
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
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
