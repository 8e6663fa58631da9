"""What this machine has: versions and whether they fit one another, devices that compute, room for Ray.

Needs no Ray: runs on a laptop, in the image, and as a task on every node of a cluster (recray.cluster.doctor).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import recray

_GIB = 2**30
_SHARED_MEMORY = 1 * _GIB  # a container has 64 MiB unless told; Ray's object store then falls back to the disk
_DISK = 5 * _GIB
_DISK_SHARE = 0.95  # above it Ray refuses to spill (RAY_local_fs_capacity_threshold)
_SECONDS = 120  # an all-reduce that takes longer hangs
_LOCK = "pip install -r requirements.lock"


class Finding(NamedTuple):
    name: str
    value: str
    problem: str = ""  # what is wrong and what to do; empty where all is well


def inspect() -> list[Finding]:
    """Everything that can be known of this machine alone; takes about ten seconds."""
    torch, torch_finding = _package("torch")
    found = [_python(), Finding("recray", recray.__version__, _unmet("recray")), torch_finding]
    found += [_package(name)[1] for name in ("ray", "pyarrow", "numpy")]
    found.append(_faiss())
    if torch is not None:
        found += [*_cuda(torch), *_devices(torch), *_collectives(torch)]
    return [*found, *_room()]


def _python() -> Finding:
    version = platform.python_version()
    problem = "" if sys.version_info >= (3, 11) else "recray needs Python 3.11 or later: make the environment with one"
    return Finding("python", version, problem)


def _package(name: str) -> tuple[Any, Finding]:
    """The imported module (None where it cannot be imported) and its version, checked against what it requires."""
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:
        return None, Finding(name, "cannot be imported", f"{error}: {_LOCK}")
    return module, Finding(name, str(module.__version__), _unmet(name))


def _unmet(name: str) -> str:
    """Which direct requirement of an installed package is missing or of another version."""
    from packaging.requirements import Requirement

    try:
        texts = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return ""  # code on PYTHONPATH
    problems = []
    for text in texts:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            there = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            problems.append(f"needs {wanted.name}{wanted.specifier}, which is not installed")
            continue
        if not wanted.specifier.contains(there, prereleases=True):
            problems.append(f"needs {wanted.name}{wanted.specifier}, but {there} is installed")
    return f"{'; '.join(problems)}: {_LOCK}" if problems else ""


def _faiss() -> Finding:
    builds = [name for name in ("faiss-cpu", "faiss-gpu") if _installed(name)]
    try:
        faiss = importlib.import_module("faiss")
    except (ImportError, OSError) as error:
        advice = "pip install 'recray[cpu]', or 'recray[gpu]' on a machine with an NVIDIA GPU"
        if "libcu" in str(error):
            advice = "faiss-gpu needs the CUDA libraries it was built with: pip install --force-reinstall 'recray[gpu]'"
        return Finding("faiss", "cannot be imported", f"{error}: {advice}")
    if len(builds) > 1:
        advice = "pip uninstall faiss-cpu faiss-gpu, then install one of them"
        return Finding("faiss", faiss.__version__, f"faiss-cpu and faiss-gpu overwrite one another: {advice}")
    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    build = builds[0] if builds else "faiss"
    return Finding("faiss", f"{faiss.__version__} ({build}, {gpus} GPU)", _unmet(build) if builds else "")


def _installed(name: str) -> bool:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return bool(metadata.version(name))
    return False


def _driver() -> tuple[str, int]:
    """Version of the NVIDIA driver and the newest CUDA that it runs, as 1000 * major + 10 * minor; ("", 0) without one."""
    version = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        version = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split("\n")[0]
    newest = ctypes.c_int(0)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(newest))
    return version.strip(), newest.value


def driver_problem(newest: int, built: str | None) -> str:
    """Whether a driver that runs CUDA up to `newest` runs a torch that was built with CUDA `built`.

    Within one major version an older driver runs newer minor versions (CUDA minor version compatibility).
    """
    if not newest:
        return ""
    if built is None:
        return "there is a GPU, but this torch is built without CUDA: install the CUDA build of the locked torch"
    major = int(built.split(".")[0])
    if newest // 1000 >= major:
        return ""
    known = {11: "450.80", 12: "525.60", 13: "580.65"}.get(major, "a newer one")
    return (
        f"the driver runs CUDA up to {newest // 1000}.{newest % 1000 // 10}, but torch is built with {built}: "
        f"update the driver to {known} or later, or install a torch for CUDA {newest // 1000}"
    )


def _cuda(torch: Any) -> list[Finding]:
    version, newest = _driver()
    built = torch.version.cuda
    problem = driver_problem(newest, built)
    if newest and built and not problem:
        try:
            torch.cuda.init()
        except Exception as error:
            problem = (
                f"torch cannot use the GPU: {error}: check `nvidia-smi` and, in a container, `docker run --gpus all`"
            )
    shown = (
        f"{version or 'of unknown version'}, CUDA up to {newest // 1000}.{newest % 1000 // 10}" if newest else "none"
    )
    found = [Finding("driver", shown, problem), Finding("cuda", built or "none: torch for the CPU")]
    if built:
        found += [_library("nccl", torch.cuda.nccl.version), _library("cudnn", torch.backends.cudnn.version)]
    return found


def _library(name: str, version: Any) -> Finding:
    """A CUDA library that torch loads; cuDNN's own check compares the loaded version with the one torch was built with."""
    try:
        found = version()
    except Exception as error:
        return Finding(name, "cannot be loaded", f"{error}: another copy comes first; unset LD_LIBRARY_PATH")
    return Finding(name, ".".join(map(str, found)) if isinstance(found, tuple) else str(found))


def _devices(torch: Any) -> list[Finding]:
    """A product of small whole numbers on every device: exact in every precision, so it must be equal."""
    names = ["cpu"]
    if torch.cuda.is_available():
        names += [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    a = torch.arange(256 * 256).reshape(256, 256) % 7
    wanted = a @ a.T
    found = []
    for name in names:
        label = f"{os.cpu_count()} cores, {platform.machine()}"
        try:
            if name != "cpu":
                at = torch.cuda.get_device_properties(name)
                label = f"{at.name}, {at.total_memory / _GIB:.0f} GiB, compute {at.major}.{at.minor}"
            x = a.float().to(name)
            right = bool(((x @ x.T).cpu() == wanted).all())
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            found.append(Finding(name, label, f"a matrix product fails: {first}: use a torch built for this device"))
            continue
        found.append(Finding(name, f"{label}, product right" if right else label, "" if right else _WRONG))
    return found


_WRONG = "a matrix product is wrong: take this machine out of the cluster"


def _collectives(torch: Any) -> list[Finding]:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() and torch.distributed.is_nccl_available() else 0
    found = [all_reduce("gloo", 2)]
    return [*found, all_reduce("nccl", gpus)] if gpus else found


def all_reduce(backend: str, world: int) -> Finding:
    """Sum over `world` processes of this machine; with nccl, one on each GPU."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        processes = [start_rank(backend, rank, world, meeting, rank) for rank in range(world)]
        return finish(f"all-reduce {backend}", f"{world} processes", processes)


def start_rank(backend: str, rank: int, world: int, meeting: str, device: int) -> subprocess.Popen[str]:
    """One rank of an all-reduce in a process of its own, so that one that hangs can be ended."""
    command = [sys.executable, "-m", "recray.cluster.environment", backend, str(rank), str(world), meeting, str(device)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(Path(recray.__file__).parents[1]), *sys.path]))}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)


def finish(name: str, value: str, processes: list[subprocess.Popen[str]]) -> Finding:
    """Wait for the ranks and end those that hang."""
    started = time.perf_counter()
    errors = []
    for process in processes:
        try:
            _, error = process.communicate(timeout=max(1.0, _SECONDS - (time.perf_counter() - started)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            errors.append(f"no answer within {_SECONDS} s")
            continue
        if process.returncode:
            errors.append((error.strip().splitlines() or [f"exit code {process.returncode}"])[-1])
    if errors:
        advice = "check that this host's name resolves and that no firewall is between; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the interface"
        return Finding(name, value, f"{errors[0]}: {advice}")
    return Finding(name, f"{value}, sum right")


def _rank(backend: str, rank: int, world: int, meeting: str, device: int) -> None:
    import torch
    import torch.distributed as dist

    where = torch.device(f"cuda:{device}" if backend == "nccl" else "cpu")
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=world)
    values = torch.full((1000,), float(rank + 1), device=where)
    dist.all_reduce(values)
    wanted = world * (world + 1) / 2
    if not bool((values == wanted).all()):
        raise SystemExit(f"the sum over {world} ranks is {values[0].item()} instead of {wanted}")
    dist.destroy_process_group()


def _room() -> list[Finding]:
    found = []
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm")
        advice = "start the container with --shm-size=8g, on Kubernetes mount an emptyDir of medium Memory at /dev/shm"
        small = shared.total < _SHARED_MEMORY
        problem = f"too small for Ray's object store, which then uses the disk: {advice}" if small else ""
        found.append(Finding("shared memory", _size(shared.free, shared.total), problem))
    disk = shutil.disk_usage(tempfile.gettempdir())
    full = disk.free < _DISK or disk.used > _DISK_SHARE * disk.total
    problem = (
        "Ray spills here and stops at 95 %: free space, or set TMPDIR and RAY_TMPDIR to a larger disk" if full else ""
    )
    return [*found, Finding(f"disk at {tempfile.gettempdir()}", _size(disk.free, disk.total), problem)]


def _size(free: int, total: int) -> str:
    return f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free"


if __name__ == "__main__":
    _rank(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
