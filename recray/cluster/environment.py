"""Check this machine: package versions, devices, collectives, shared memory and disk.

Needs no Ray: it runs on a laptop, in the image, and as a Ray task on every node of a cluster (recray.cluster.doctor).
Every check gives one or more findings. A finding without a problem is fine; a problem says what is wrong and what to do:

    Finding("driver", "535.54, CUDA up to 12.2",
            "the driver supports CUDA up to 12.2, but torch is built with 13.0: update the driver to 580.65 or later, ...")
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
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import recray
from recray.cluster import cpus, runtime

_GIB = 2**30
_SHARED_MEMORY = 1 * _GIB  # containers have 64 MiB by default; Ray's object store then falls back to disk
_DISK = 5 * _GIB
_DISK_SHARE = 0.95  # when the disk is fuller than this, Ray refuses to spill (RAY_local_fs_capacity_threshold)
_SECONDS = 120  # limit of one all-reduce, start of its processes included
_LOCK = "pip install -r requirements.lock"
_DRIVERS = {11: "450.80", 12: "525.60", 13: "580.65"}  # CUDA major version -> first driver that supports it
_NETWORK = (
    "check that this host's name resolves and that no firewall blocks the connection; "
    "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME select the network interface"
)


class Finding(NamedTuple):
    name: str
    value: str
    problem: str = ""  # what is wrong and what to do; empty if nothing is wrong


def inspect() -> list[Finding]:
    """All checks of this machine. Takes about ten seconds."""
    conflicts = pip_check()
    old = "" if sys.version_info >= (3, 11) else "recray needs Python 3.11 or later: make the environment with it"
    found = [
        Finding("python", platform.python_version(), old),
        Finding("recray", recray.__version__, conflicts.get("recray", "")),
        *(_package(name, conflicts) for name in ("torch", "ray", "pyarrow", "numpy")),
        _faiss(conflicts),
    ]
    if "torch" in sys.modules:  # it could be imported
        import torch

        found += [*_cuda(torch), *_devices(torch), all_reduce("gloo", 2)]
        if torch.distributed.is_nccl_available() and torch.cuda.is_available():
            found.append(all_reduce("nccl", torch.cuda.device_count()))
    return [*found, *_space()]


def pip_check() -> dict[str, str]:
    """Problems that `pip check` reports, by the package that has them; empty where pip is not installed."""
    command = [sys.executable, "-m", "pip", "check", "--disable-pip-version-check"]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS).stdout.splitlines()
    problems: dict[str, list[str]] = {}
    for line in lines:  # "recray 0.1.0 has requirement pydantic>=2.7, but you have pydantic 1.0."
        problems.setdefault(line.partition(" ")[0].lower(), []).append(line.rstrip("."))
    return {name: f"{'; '.join(found)}: {_LOCK}" for name, found in problems.items()}


def _package(name: str, conflicts: dict[str, str]) -> Finding:
    try:
        return Finding(name, str(importlib.import_module(name).__version__), conflicts.get(name, ""))
    except (ImportError, OSError) as error:
        return Finding(name, "cannot be imported", f"{error}: {_LOCK}")


def _faiss(conflicts: dict[str, str]) -> Finding:
    installed = {one.metadata["Name"] for one in metadata.distributions()}
    builds = [name for name in ("faiss-cpu", "faiss-gpu") if name in installed]
    try:
        faiss = importlib.import_module("faiss")
    except (ImportError, OSError) as error:
        advice = "pip install 'recray[cpu]', or 'recray[gpu]' on a machine with an NVIDIA GPU"
        if "libcu" in str(error):
            advice = "faiss-gpu needs the CUDA libraries it was built with: pip install --force-reinstall 'recray[gpu]'"
        return Finding("faiss", "cannot be imported", f"{error}: {advice}")
    if len(builds) > 1:
        advice = "pip uninstall faiss-cpu faiss-gpu, then install one of them"
        return Finding("faiss", faiss.__version__, f"faiss-cpu and faiss-gpu overwrite each other's files: {advice}")
    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    build = builds[0] if builds else "faiss"
    return Finding("faiss", f"{faiss.__version__} ({build}, {gpus} GPUs)", conflicts.get(build, ""))


def driver_problem(newest: int, built: str | None) -> str:
    """What is wrong with torch built for CUDA `built` on a driver that supports CUDA up to `newest`; "" if nothing.

    `newest` is 1000 * major + 10 * minor, as cuDriverGetVersion returns it; 0 means no driver. Within a major version,
    an older driver runs newer minor versions (CUDA minor version compatibility).
    """
    if not newest:
        return ""
    if built is None:
        return "there is a GPU, but this torch is built without CUDA: install the CUDA build of the torch in the lock"
    major = int(built.split(".")[0])
    if newest // 1000 >= major:
        return ""
    return (
        f"the driver supports CUDA up to {_cuda_version(newest)}, but torch is built with {built}: update the driver to "
        f"{_DRIVERS.get(major, 'a newer version')} or later, or install a torch for CUDA {newest // 1000}"
    )


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _cuda(torch: Any) -> list[Finding]:
    number = ctypes.c_int(0)
    with contextlib.suppress(OSError, AttributeError):  # no driver
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    newest, built = number.value, torch.version.cuda
    problem = driver_problem(newest, built)
    if newest and built and not problem:
        try:
            torch.cuda.init()
        except Exception as error:
            advice = "check `nvidia-smi` and, in a container, `docker run --gpus all`"
            problem = f"torch cannot use the GPU: {error}: {advice}"
    driver = "none"
    if newest:
        facts = importlib.import_module("torch.utils.collect_env")  # untyped
        version = facts.get_nvidia_driver_version(facts.run) or "unknown version"
        driver = f"{version}, CUDA up to {_cuda_version(newest)}"
    found = [Finding("driver", driver, problem), Finding("cuda", built or "none: CPU build of torch")]
    libraries = {"nccl": torch.cuda.nccl.version, "cudnn": torch.backends.cudnn.version} if built else {}
    for name, loaded in libraries.items():
        try:  # cuDNN's call also compares the loaded version with the one that torch was built with
            found.append(Finding(name, str(loaded()).strip("()").replace(", ", ".")))  # nccl: (2, 27, 5)
        except Exception as error:
            advice = "another copy is found first; unset LD_LIBRARY_PATH"
            found.append(Finding(name, "cannot be loaded", f"{error}: {advice}"))
    return found


def _devices(torch: Any) -> list[Finding]:
    """Multiply matrices of small integers on every device: the result is exact in every precision."""
    a = torch.arange(256 * 256).reshape(256, 256) % 7
    wanted = a @ a.T
    found = []
    for name in ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]:
        label, problem = f"{cpus.available()} of {os.cpu_count()} cores, {platform.machine()}", ""
        try:
            if name != "cpu":
                gpu = torch.cuda.get_device_properties(name)
                label = f"{gpu.name}, {gpu.total_memory / _GIB:.0f} GiB, compute {gpu.major}.{gpu.minor}"
            x = a.float().to(name)
            if not bool(((x @ x.T).cpu() == wanted).all()):
                problem = "matmul gives a wrong result: the hardware is faulty, remove this machine from the cluster"
        except RuntimeError as error:
            problem = f"matmul fails: {str(error).splitlines()[0]}: install a torch that is built for this device"
        found.append(Finding(name, label if problem else f"{label}, matmul OK", problem))
    return found


def all_reduce(backend: str, world: int, ranks: Sequence[int] | None = None, init_method: str | None = None) -> Finding:
    """All-reduce over `world` processes, with nccl one per GPU. `ranks`: those to start on this machine, all by default.

    Each rank is a subprocess, so that a collective that hangs can be killed.
    """
    alone = {} if init_method else runtime.loopback()
    env = (
        alone
        | os.environ
        | {"PYTHONPATH": os.pathsep.join(filter(None, [str(Path(recray.__file__).parents[1]), *sys.path]))}
    )
    deadline = time.monotonic() + _SECONDS
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", __name__, backend, str(world), init_method or f"file://{folder}/store"]
        processes = [
            subprocess.Popen(
                [*command, str(rank)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env
            )
            for rank in (range(world) if ranks is None else ranks)
        ]
        for process in processes:
            try:
                _, text = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                errors.append(f"no result within {_SECONDS} s")
                continue
            if process.returncode:
                errors.append((text.strip().splitlines() or [f"exit code {process.returncode}"])[-1])
    name = f"all-reduce {backend}"
    return Finding(name, f"{world} ranks", f"{errors[0]}: {_NETWORK}") if errors else Finding(name, f"{world} ranks OK")


def _rank(backend: str, world: int, init_method: str, rank: int) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=world)
    device = f"cuda:{rank % torch.cuda.device_count()}" if backend == "nccl" else "cpu"
    values = torch.full((1000,), float(rank + 1), device=device)
    dist.all_reduce(values)
    wanted = world * (world + 1) / 2  # 1 + 2 + ... + world
    if not bool((values == wanted).all()):
        raise SystemExit(f"the sum over {world} ranks is {values[0].item()} instead of {wanted}")
    dist.destroy_process_group()


def _space() -> list[Finding]:
    found = []
    memory = "/dev/shm"  # nosec B108 - only its size is asked for
    if Path(memory).is_dir():
        shared = shutil.disk_usage(memory)
        problem = (
            "too small for Ray's object store, which then uses the disk: start the container with --shm-size=8g; on "
            "Kubernetes mount an emptyDir with medium Memory at /dev/shm"
        )
        found.append(_usage("shared memory", shared, problem if shared.total < _SHARED_MEMORY else ""))
    folder = tempfile.gettempdir()
    disk = shutil.disk_usage(folder)
    full = disk.free < _DISK or disk.used > _DISK_SHARE * disk.total
    problem = "Ray spills objects here and stops at 95 %: free space, or set TMPDIR and RAY_TMPDIR to a larger disk"
    return [*found, _usage(f"disk at {folder}", disk, problem if full else "")]


def _usage(name: str, usage: Any, problem: str) -> Finding:
    return Finding(name, f"{usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free", problem)


if __name__ == "__main__":
    _rank(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
