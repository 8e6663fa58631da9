"""`recray doctor`: what is fine passes, and a problem is red and says what to do."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from recray.cli import app
from recray.cluster import doctor, environment
from recray.cluster.doctor import Machine
from recray.cluster.environment import Finding, driver_problem


@pytest.mark.parametrize(
    ("newest", "built", "problem"),
    [
        (0, "12.4", ""),  # no driver: a CPU machine
        (12020, "12.6", ""),  # an older minor version of the same major version
        (13000, "12.6", ""),  # a newer driver runs older versions
        (12080, "13.0", "supports CUDA up to 12.8, but torch is built with 13.0: update the driver to 580.65"),
        (12080, None, "built without CUDA"),
    ],
)
def test_driver_and_torch(newest: int, built: str | None, problem: str) -> None:
    found = driver_problem(newest, built)
    assert problem in found and bool(found) == bool(problem)


def test_faiss_without_libcudart_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    message = "libcudart.so.12: cannot open shared object file: No such file or directory"
    (tmp_path / "faiss.py").write_text(f"raise ImportError({message!r})\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    found = environment._faiss({})
    assert message in found.problem and "recray[gpu]" in found.problem


def test_an_unmet_requirement_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pip sees a distribution `torch` on PYTHONPATH that needs a newer numpy and a package that is not installed."""
    info = tmp_path / "torch-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 9.9\nRequires-Dist: numpy>=99\nRequires-Dist: not-a-package\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    conflicts = environment.pip_check()
    assert "numpy>=99" in conflicts["torch"] and "not-a-package" in conflicts["torch"]
    found = environment._package("torch", conflicts)
    assert found.problem == conflicts["torch"] and found.problem.endswith("pip install -r requirements.lock")


def test_a_package_that_cannot_be_imported_is_a_problem() -> None:
    found = environment._package("no_such_package", {})
    assert found.value == "cannot be imported" and "pip install -r requirements.lock" in found.problem


def test_a_failing_rank_is_a_problem() -> None:
    found = environment.all_reduce("no-such-backend", 1)
    assert "no-such-backend" in found.problem


def test_a_rank_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of 2 waits for a rank 1 that never starts."""
    monkeypatch.setattr(environment, "_SECONDS", 1)
    found = environment.all_reduce("gloo", 2, ranks=[0])
    assert "no result within 1 s" in found.problem


@pytest.mark.parametrize(("problem", "code"), [("", 0), ("too old: update it", 1)])
@pytest.mark.parametrize("arguments", [["doctor"], ["doctor", "--env"]])
def test_exit_code(arguments: list[str], problem: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [Machine("here", [Finding("driver", "1", problem)])])
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, problem in result.output) == (code, True)
    assert ("1 machine, 1 problem" if problem else "1 machine, no problems") in result.output


def test_a_node_with_another_version_is_a_problem() -> None:
    here = [Finding("torch", "2.13.0+cpu"), Finding("ray", "2.60.0"), Finding("cuda", "none")]
    assert not doctor.compare(Finding("torch", "2.13.0+cu130"), here).problem  # the head may have no GPU
    assert not doctor.compare(Finding("cuda", "13.0"), here).problem
    assert "2.60.0 on the machine that starts the run" in doctor.compare(Finding("ray", "2.59.0"), here).problem
    assert "2.13.0" in doctor.compare(Finding("torch", "2.6.0+cu124"), here).problem
