"""`recray doctor --env`: what is right is passed, and what is wrong is red and says what to do."""

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
        (12020, "12.6", ""),  # older minor version of the same major
        (13000, "12.6", ""),  # a newer driver runs what is older
        (12080, "13.0", "the driver runs CUDA up to 12.8, but torch is built with 13.0: update the driver to 580.65"),
        (12080, None, "built without CUDA"),
    ],
)
def test_driver_and_torch(newest: int, built: str | None, problem: str) -> None:
    found = driver_problem(newest, built)
    assert problem in found and bool(found) == bool(problem)


def test_a_faiss_that_misses_libcudart_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    message = "libcudart.so.12: cannot open shared object file: No such file or directory"
    (tmp_path / "faiss.py").write_text(f"raise ImportError({message!r})\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    found = environment._faiss()
    assert message in found.problem and "recray[gpu]" in found.problem


def test_a_package_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = environment.metadata.version
    monkeypatch.setattr(environment.metadata, "version", lambda name: "1.0" if name == "pydantic" else real(name))
    assert "needs pydantic>=2.7, but 1.0 is installed" in environment._unmet("recray")


def test_a_rank_that_fails_is_a_problem() -> None:
    found = environment.all_reduce("no-such-backend", 1)
    assert "no-such-backend" in found.problem


@pytest.mark.parametrize(("problem", "code"), [("", 0), ("too old: update it", 1)])
def test_the_exit_code_tells(problem: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [Machine("here", [Finding("driver", "1", problem)])])
    result = CliRunner().invoke(app, ["doctor", "--env"])
    assert (result.exit_code, problem in result.output) == (code, True)
    assert ("1 machine, 1 problem" if problem else "1 machine, no problems") in result.output


def test_a_node_with_another_version_does_not_fit() -> None:
    here = [Finding("torch", "2.13.0+cpu"), Finding("ray", "2.60.0"), Finding("cuda", "none")]
    assert not doctor._like(Finding("torch", "2.13.0+cu130"), here).problem  # the head may have no GPU
    assert not doctor._like(Finding("cuda", "13.0"), here).problem
    assert "2.60.0 where the run is started" in doctor._like(Finding("ray", "2.59.0"), here).problem
    assert "2.13.0" in doctor._like(Finding("torch", "2.6.0+cu124"), here).problem
