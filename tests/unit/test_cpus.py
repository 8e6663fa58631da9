"""How many CPUs a process may use, on made-up control groups, and how OpenMP's threads wait."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recray.cluster import cpus
from recray.config import ScalingConfig
from recray.training.distributed import threads

V2 = "0::{path}\n"
V1 = "12:memory:{path}\n4:cpu,cpuacct:{path}\n3:cpuset:{path}\n1:name=systemd:/init\n0::/\n"


def _machine(root: Path, cgroup: str, files: dict[str, str]) -> str:
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return str(root)


@pytest.fixture(autouse=True)
def _cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000"}, 64),
        ({"cpu.max": "400000 100000"}, 4),
        ({"cpu.max": "150000 100000"}, 2),  # 1.5 CPUs keep two threads busy, three quarters of the time
        ({"cpu.max": "5000 100000"}, 1),
        ({"cpu.max": "9900000 100000"}, 64),  # more than there are
        ({"pods/cpu.max": "300000 100000", "pods/a/cpu.max": "max 100000"}, 3),  # of a group above it
        ({"cpu.max": "800000 100000", "pods/a/cpu.max": "250000 50000"}, 5),
        ({"cpu.max": "damaged"}, 64),
    ],
)
def test_a_quota_of_cgroup_v2(limits: dict[str, str], expected: int, tmp_path: Path) -> None:
    files = {f"sys/fs/cgroup/{name}": text for name, text in limits.items()}
    assert cpus.available(_machine(tmp_path, V2.format(path="/pods/a"), files)) == expected


@pytest.mark.parametrize(
    ("folder", "quota", "expected"),
    [
        ("", "200000", 2),  # a container: its group is mounted at the root, under the host's name for it
        ("docker/7f", "600000", 6),
        ("docker", "700000", 7),
        ("docker/7f", "-1", 64),
    ],
)
def test_a_quota_of_cgroup_v1(folder: str, quota: str, expected: int, tmp_path: Path) -> None:
    group = f"sys/fs/cgroup/cpu,cpuacct/{folder}"
    files = {f"{group}/cpu.cfs_quota_us": quota, f"{group}/cpu.cfs_period_us": "100000"}
    assert cpus.available(_machine(tmp_path, V1.format(path="/docker/7f"), files)) == expected


def test_a_machine_without_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpus.available(str(tmp_path)) == 64
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    assert cpus.available(str(tmp_path)) == 10


@pytest.mark.parametrize(
    ("scaling", "local_workers", "expected"),
    [
        (ScalingConfig(num_workers=1), 1, 6),
        (ScalingConfig(num_workers=8), 4, 1),  # two nodes with four workers each
        (ScalingConfig(num_workers=4), 2, 3),
        (ScalingConfig(num_workers=2, threads_per_worker=5), 2, 5),
    ],
)
def test_torch_has_a_thread_per_available_cpu(
    scaling: ScalingConfig, local_workers: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpus, "available", lambda: 6)
    before = torch.get_num_threads()
    with threads(scaling, local_workers):
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == before


def test_without_workers_torch_keeps_its_threads_within_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    for found, expected in ((1, 1), (1000, before)):
        monkeypatch.setattr(cpus, "available", lambda found=found: found)
        with threads(ScalingConfig(num_workers=0)):
            assert torch.get_num_threads() == expected


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "30000"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"KMP_BLOCKTIME": "0"}, {"KMP_BLOCKTIME": "0"}),
    ],
)
def test_threads_spin_for_a_moment_unless_the_user_says_otherwise(
    own: dict[str, str], expected: dict[str, str]
) -> None:
    """In a process of its own: it must be set before torch is loaded, by importing recray alone."""
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")} | own
    code = "import sys, recray; from recray.cluster import cpus; print(cpus.waiting(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{expected} False"


def test_tests_run_as_recray_does() -> None:
    assert cpus.waiting()
