"""The wheel and the sdist hold the package, and what is installed from the wheel runs the demo without the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from helpers.configs import REPOSITORY

_BUILD = """
import sys
from setuptools import build_meta
target = sys.argv[1]  # building sets sys.argv
build_meta.build_wheel(target)
build_meta.build_sdist(target)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Wheel and sdist of the files that git tracks, built in a copy so that the working tree stays as it is."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=REPOSITORY, capture_output=True
    )
    if listed.returncode:
        pytest.skip("the tests do not run in a git clone")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (REPOSITORY / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((REPOSITORY / name).read_bytes())
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", _BUILD, str(target)]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(target.glob("*.whl")), next(target.glob("*.tar.gz"))


def _package_files() -> set[str]:
    """Every file of recray/ but compiled ones: modules, and data such as pages and templates."""
    root = REPOSITORY / "recray"
    return {
        str(path.relative_to(REPOSITORY))
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md"
    }


def test_the_wheel_holds_every_module_and_data_file_and_nothing_else(built: tuple[Path, Path]) -> None:
    names = set(zipfile.ZipFile(built[0]).namelist())
    files = {name for name in names if ".dist-info/" not in name}
    assert files - {name for name in files if name.endswith(".md")} == _package_files()
    (metadata,) = (name for name in names if name.endswith("/METADATA"))
    assert b"Requires-Python: >=3.11" in zipfile.ZipFile(built[0]).read(metadata)
    (entry,) = (name for name in names if name.endswith("/entry_points.txt"))
    assert b"recray = recray.cli:main" in zipfile.ZipFile(built[0]).read(entry)


def test_the_sdist_holds_what_a_build_needs(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE"} | _package_files() <= names


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a new environment with the wheel, and the packages of this one behind it (a path in a .pth file)."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install"]
    subprocess.run([*pip, "--quiet", "--no-deps", "--no-index", str(built[0])], check=True, env=_clean())
    (site,) = folder.glob("lib/python*/site-packages")
    # Editable installs of this environment are in .pth files of its own, which are not read from here.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin"


def _clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def test_the_installed_package_is_the_one_that_runs(installed: Path, tmp_path: Path) -> None:
    code = (
        "import recray, importlib.metadata as m; print(recray.__file__); print(m.version('recray'), recray.__version__)"
    )
    done = subprocess.run(
        [installed / "python", "-c", code], cwd=tmp_path, env=_clean(), capture_output=True, text=True, check=True
    )
    file, versions = done.stdout.splitlines()
    assert Path(file).is_relative_to(installed.parent)
    assert len(set(versions.split())) == 1
    help_text = subprocess.run(
        [installed / "recray", "--help"], cwd=tmp_path, env=_clean(), capture_output=True, text=True
    )
    assert help_text.returncode == 0 and "evaluate" in help_text.stdout


@pytest.mark.slow
def test_the_installed_command_runs_the_demo(installed: Path, tmp_path: Path) -> None:
    demo = tmp_path / "demo.toml"
    demo.write_bytes((REPOSITORY / "jobs" / "configs" / "demo.toml").read_bytes())
    done = subprocess.run(
        [installed / "recray", "run", "demo.toml"],
        cwd=tmp_path,
        env=_clean(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "oracle" in done.stdout and "popularity" in done.stdout
    assert next((tmp_path / "runs" / "demo").rglob("report.json"))
