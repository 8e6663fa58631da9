"""The CPU image, run: its size, its environment, its users, the notebook."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import BUILD_OPTIONS, ENGINE, IMAGE, engine, run


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A folder of a user who is none of the image's."""
    if os.getuid() == 0:
        shutil.chown(tmp_path, 12345, 12345)
    tmp_path.chmod(0o755)
    return tmp_path


def test_size_and_layers() -> None:
    (found,) = json.loads(engine("image", "inspect", IMAGE))
    assert found["Size"] <= 2.1e9, found["Size"]
    sizes = [
        line for line in engine("history", "--human=false", "--format", "{{.Size}}", IMAGE).split() if line.isdigit()
    ]
    code = [int(size) for size in sizes[: sizes.index(max(sizes, key=int))]]  # what lies above the packages
    assert sum(code) <= 20e6, code


def test_the_environment_is_the_lock() -> None:
    assert run("recray", "doctor", "--env").splitlines()[-1] == "1 machine, no problems"
    assert not run("sh", "-c", "pip list --format=freeze | grep -E '^(pytest|mypy|ruff|moto)==' || true").strip()


def test_programs_that_ray_up_needs_are_found_by_a_login_shell() -> None:
    names = ["ray", "recray", "python", "rsync", "ssh", "wget", "g++"]
    found = run("bash", "--login", "-c", "command -v " + " ".join(names), options=("--user", "recray")).split()
    assert [Path(path).name for path in found] == names
    assert found[0] == "/opt/recray/bin/ray"
    assert run("printenv", "HOME").strip() == "/home/recray"


def test_what_is_written_to_a_mounted_folder_belongs_to_its_owner(code: Path) -> None:
    run("sh", "-c", "touch made && id -u > user && touch $HOME/of-home", options=("-v", f"{code}:/workspace"))
    owner = code.stat().st_uid
    assert (code / "made").stat().st_uid == owner
    assert (code / "user").read_text().strip() == str(owner)
    failed = engine(
        "run", "--rm", "-v", f"{code}:/workspace", IMAGE, "touch", "/src/recray/new", "/opt/recray/new", check=False
    )
    assert failed == "" and run("sh", "-c", "ls /src/recray/new || echo none").strip() == "none"


def test_the_demo_runs_in_a_mounted_folder(code: Path) -> None:
    run(
        "recray", "--json", "run", "/src/jobs/configs/demo.toml", "--set", "training.epochs=1", "--set",
        "data.simulated.events=20000", options=("-v", f"{code}:/workspace"),
    )  # fmt: skip
    report = code / "runs" / "demo" / "report" / "current" / "report.json"
    assert report.stat().st_uid == code.stat().st_uid


def test_torch_compiles() -> None:
    program = "import torch; f = torch.compile(lambda x: (x.sin() + 1).sum()); print(float(f(torch.zeros(8))))"
    assert run("python", "-c", program).strip().endswith("8.0")


@pytest.fixture
def notebook(code: Path) -> Iterator[str]:
    """The line of the documentation: nothing but a port and a folder."""
    name = engine(
        "run", "-d", "--rm", "--init", "-p", "127.0.0.1:18888:8888", "-v", f"{code}:/workspace", IMAGE
    ).strip()
    yield name
    engine("stop", "-t", "5", name, check=False)


def test_jupyter_serves_the_mounted_folder(code: Path, notebook: str) -> None:
    (code / "mine.py").write_text("print('hello')")
    give_up = time.monotonic() + 90
    while True:
        try:
            with urllib.request.urlopen("http://127.0.0.1:18888/api", timeout=5) as answer:
                assert "version" in json.load(answer)
            break
        except (urllib.error.URLError, ConnectionError):
            assert time.monotonic() < give_up, engine("logs", notebook, check=False)
            time.sleep(0.5)
    log = subprocess.run([ENGINE, "logs", notebook], capture_output=True, text=True, timeout=30)
    token = (log.stdout + log.stderr).partition("token=")[2].split()[0]
    with urllib.request.urlopen(f"http://127.0.0.1:18888/api/contents?token={token}", timeout=10) as answer:
        assert "mine.py" in {entry["name"] for entry in json.load(answer)["content"]}
    engine("exec", notebook, "python", "/src/docker/health.py")
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen("http://127.0.0.1:18888/api/contents", timeout=10)


def test_an_image_of_ones_own_adds_packages(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(f"FROM {IMAGE}\nRUN pip install --no-cache-dir tabulate==0.9.0\n")
    engine("build", *BUILD_OPTIONS, "-t", "recray-test:child", str(tmp_path))
    child = engine("run", "--rm", "recray-test:child", "python", "-c", "import tabulate, recray; print('both')")
    assert child.strip() == "both"
    engine("rmi", "recray-test:child")
