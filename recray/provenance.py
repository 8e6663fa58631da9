"""With which code, packages and machine a record was made. Nothing here reads a secret, and of the host only the name."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess  # nosec B404 - only git, with fixed arguments
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict

_PACKAGES = ("recray", "torch", "ray", "pyarrow", "numpy", "faiss-cpu", "faiss-gpu", "safetensors", "pydantic")
_SECONDS = 10  # of git, which may wait for a network file system


class GitState(BaseModel):
    """The commit of a working tree, and whether tracked files differ from it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    commit: str
    dirty: bool = False


class Provenance(BaseModel):
    """Where a record was made. Not part of its id: the same work on another machine has the same id."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = ""
    devices: list[str] = []  # e.g. ["16 CPUs, x86_64", "NVIDIA H100 80GB HBM3"]
    versions: dict[str, str] = {}  # "python" and installed packages
    project: GitState | None = None  # of the folder in which the command ran
    package: GitState | None = None  # of recray itself, where it is installed from a working tree
    image: str = ""  # RECRAY_IMAGE: digest or name of the container image
    lock: str = ""  # SHA-256 of requirements.lock: that of the folder, else that beside the package


@cache
def here() -> Provenance:
    """Of this process. What git says is asked once: a training is one commit, even if files change below it."""
    package = Path(__file__).parents[1]
    commit = os.environ.get("RECRAY_COMMIT", "")
    return Provenance(
        host=platform.node(),
        devices=_devices(),
        versions={"python": platform.python_version()} | _versions(),
        project=_git(Path.cwd()),
        package=GitState(commit=commit) if commit else _git(package),
        image=os.environ.get("RECRAY_IMAGE", ""),
        lock=next((_hash(folder / "requirements.lock") for folder in (Path.cwd(), package) if _is_lock(folder)), ""),
    )


def _is_lock(folder: Path) -> bool:
    return (folder / "requirements.lock").is_file()


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _devices() -> list[str]:
    found = [f"{os.cpu_count()} CPUs, {platform.machine()}"]
    torch = sys.modules.get("torch")  # importing it takes seconds: a stage that has not done so uses no GPU
    if torch is not None and torch.cuda.is_available():
        found += [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return found


def _git(folder: Path) -> GitState | None:
    """None where the folder is in no working tree, or there is no git."""
    # A repository's own configuration may name a program for git to run: core.fsmonitor.
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(folder)]
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    outputs = []
    for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(  # nosec B603 - no shell
                [*command, *arguments], capture_output=True, text=True, timeout=_SECONDS, env=environment, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            return None
        outputs.append(done.stdout.strip())
    return GitState(commit=outputs[0], dirty=bool(outputs[1]))
