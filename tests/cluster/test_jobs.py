"""Jobs on a cluster of two nodes with token authentication: they finish, fail, are refused, stopped and resumed."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from nodes import REPOSITORY, Cluster

pytestmark = pytest.mark.slow

_TOML = """
[run]
name = "{name}"
output = "{output}"
[data]
source = "simulated"
shard_events = 4000
[data.simulated]
events = 10_000
users = 300
items = 200
[model]
name = "two_tower"
dim = 16
[training]
epochs = {epochs}
global_batch_size = 256
[scaling]
num_workers = 2
[evaluation]
k = [10]
bootstrap = 50
"""


def _toml(cluster: Cluster, folder: Path, name: str, epochs: int) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(_TOML.format(name=name, output=cluster.folder, epochs=epochs))
    return path


def _recray(cluster: Cluster, folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "recray", *arguments]
    return subprocess.run(command, env=cluster.env | env, cwd=folder, capture_output=True, text=True, timeout=600)


def _ray(cluster: Cluster, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ray.scripts.scripts", *arguments]
    return subprocess.run(command, env=cluster.env, cwd=folder, capture_output=True, text=True, timeout=600)


def test_submit_follows_the_job_and_fetches_the_report(cluster: Cluster, tmp_path: Path) -> None:
    _toml(cluster, tmp_path, "whole", 2)
    done = _recray(
        cluster, tmp_path, "submit", "whole.toml", "--address", cluster.dashboard, "--report", "got/report.json"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "plan: 2 training workers with 1 CPU each; 1 CPU left for data" in done.stdout
    assert "train: epoch 2/2" in done.stdout and "model (exact search)" in done.stdout
    assert not any(line.startswith("{") for line in done.stdout.splitlines())  # the report's line is fetched, not shown
    written = json.loads((cluster.folder / "whole" / "report" / "current" / "report.json").read_text())
    assert json.loads((tmp_path / "got" / "report.json").read_text()) == written


def test_ray_job_submit_from_another_folder(cluster: Cluster, tmp_path: Path) -> None:
    done = _ray(
        cluster,
        tmp_path,
        *("job", "submit", "--address", cluster.dashboard, "--working-dir", str(REPOSITORY), "--"),
        *("python", "-m", "recray", "prepare", "jobs/configs/demo.toml", "--set", f"run.output={cluster.folder}"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (cluster.folder / "demo" / "dataset" / "current" / "dataset.json").exists()


def test_the_whole_pipeline_on_real_clicks_and_its_report(cluster: Cluster, shared_data: Path, tmp_path: Path) -> None:
    """By `ray job submit`, then by `recray submit`, which finds every stage complete and fetches the report."""
    config = str(REPOSITORY / "jobs" / "configs" / "ml-100k.toml")
    files = {name: str(shared_data / "ml-100k" / f"{name}.parquet") for name in ("events", "items", "users")}
    keys = [f"data.path={files['events']}", f"data.items={files['items']}", f"data.users={files['users']}"]
    keys += [f"run.output={cluster.folder}", "training.epochs=2", "scaling.num_workers=2", "evaluation.bootstrap=50"]
    sets = [part for key in keys for part in ("--set", key)]
    done = _ray(
        cluster,
        tmp_path,
        *("job", "submit", "--address", cluster.dashboard, "--working-dir", str(REPOSITORY), "--"),
        *("python", "-m", "recray", "run", "jobs/configs/ml-100k.toml", *sets),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100,000 events read" in done.stdout
    written = json.loads((cluster.folder / "ml-100k" / "report" / "current" / "report.json").read_text())
    done = _recray(cluster, tmp_path, "submit", config, *sets, "--address", cluster.dashboard, "--report", "got.json")
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((tmp_path / "got.json").read_text())["metrics"]
    assert metrics == written["metrics"]
    model, popular = (metrics[name]["ndcg@10"]["value"] for name in ("model", "popularity"))
    assert model > popular


def test_an_output_that_goes_with_the_job_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    done = _ray(
        cluster,
        tmp_path,
        *("job", "submit", "--address", cluster.dashboard, "--working-dir", str(REPOSITORY), "--"),
        *("python", "-m", "recray", "prepare", "jobs/configs/demo.toml"),
    )
    assert done.returncode != 0
    assert "will be deleted with it: give s3://" in done.stdout


def test_a_wrong_token_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    _toml(cluster, tmp_path, "refused", 1)
    done = _recray(cluster, tmp_path, "submit", "refused.toml", "--address", cluster.dashboard, RAY_AUTH_TOKEN="0" * 64)
    assert done.returncode == 2
    assert "refuses the token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in done.stderr
    assert not (cluster.folder / "refused").exists()


def test_the_exit_code_is_that_of_the_job(cluster: Cluster, tmp_path: Path) -> None:
    _toml(cluster, tmp_path, "wrong", 1)
    greedy = ("--set", "scaling.cpus_per_worker=3")
    done = _recray(cluster, tmp_path, "submit", "wrong.toml", "--address", cluster.dashboard, *greedy)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "ResourceError: scaling.num_workers = 2 with 3 CPUs each, but only 0 of them fit" in done.stdout


def test_a_stopped_job_frees_its_workers_and_resumes(cluster: Cluster, tmp_path: Path) -> None:
    _toml(cluster, tmp_path, "stopped", 100)
    submit = ("submit", "stopped.toml", "--address", cluster.dashboard)
    detached = _recray(cluster, tmp_path, *submit, "--detach")
    assert detached.returncode == 0, detached.stderr
    job = detached.stdout.split()[1].rstrip(";")
    checkpoint = cluster.folder / "stopped" / "checkpoint"
    _until(lambda: any(checkpoint.glob("*/epochs/epoch-*/checkpoint.json")), "an epoch")
    assert _ray(cluster, tmp_path, "job", "stop", "--address", cluster.dashboard, job).returncode == 0
    _until(lambda: not _trainers(cluster), "the training workers to end")
    assert not (checkpoint / "current").exists()
    complete = checkpoint.glob("*/epochs/epoch-*/checkpoint.json")
    epochs = max(int(record.parent.name[-4:]) for record in complete)
    again = _recray(cluster, tmp_path, *submit, "--set", f"training.epochs={epochs + 1}")
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"train: resuming after epoch {epochs}" in again.stdout


def test_doctor_looks_at_every_node(cluster: Cluster, tmp_path: Path) -> None:
    done = _recray(cluster, tmp_path, "doctor", RAY_ADDRESS=cluster.address)
    assert done.stdout.count(" CPU, 0 GPU)") == 2, done.stdout + done.stderr
    assert done.stdout.count("all-reduce gloo") == 4 and "2 ranks OK" in done.stdout


def _trainers(cluster: Cluster) -> list[Path]:
    """Training workers of this cluster: processes with its token in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title, env = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:
            continue  # it has ended, or belongs to another user
        if b"RayTrainWorker" in title and cluster.env["RAY_AUTH_TOKEN"].encode() in env:
            found.append(process)
    return found


def _until(true: Callable[[], bool], what: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.3)
