"""The stages on Ray with a GPU: one rank of NCCL, mixed precision, trials on halves of a GPU. Skips where Ray is absent."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("torch finds no GPU", allow_module_level=True)
ray = pytest.importorskip("ray")
pytest.importorskip("faiss")

import recray  # noqa: E402
from helpers.configs import simulated_table  # noqa: E402
from recray.cluster import runtime  # noqa: E402
from recray.config import Config, parse_config  # noqa: E402


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray that recray finds, as it finds a cluster's: training is a Ray worker then, and not this process."""
    ray.init(address="local", num_cpus=4, num_gpus=1, include_dashboard=False, logging_level=logging.ERROR)
    runtime.quieten_data()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs are, and the dataset that they share."""
    folder = tmp_path_factory.mktemp("gpu")
    recray.prepare(_config(folder, "data"))
    return folder


def _config(folder: Path, name: str, *overrides: str, tune: dict[str, Any] | None = None) -> Config:
    table = simulated_table(
        folder,
        name,
        events=30_000,
        users=500,
        items=300,
        model={"name": "sasrec", "dim": 32, "history_length": 50},
        loss={"name": "softmax"},
        optim={"learning_rate": 3e-3},
        training={"epochs": 8, "global_batch_size": 16},
        scaling={"num_workers": 1, "use_gpu": True},
        evaluation={"k": [10], "bootstrap": 0},
        tune=tune or {},
    )
    return parse_config(table, [f"run.dataset={folder}/data/dataset", *overrides])


def _run(config: Config) -> dict[str, float]:
    recray.train(config)
    recray.index(config)
    metrics = recray.evaluate(config).metrics
    return {system: values["ndcg@10"].value for system, values in metrics.items()}


@pytest.fixture(scope="module")
def on_cpu(folder: Path) -> dict[str, float]:
    return _run(_config(folder, "cpu", "scaling.num_workers=0", "scaling.use_gpu=false"))


@pytest.mark.parametrize("reader", ["worker", "ray_data"])
def test_a_ray_worker_on_the_gpu_learns_what_the_cpu_learns(
    folder: Path, on_cpu: dict[str, float], reader: str
) -> None:
    """In bf16 where the card has it, with other dropout."""
    on_gpu = _run(_config(folder, f"gpu-{reader}", f"scaling.reader={reader}"))
    assert on_gpu["model"] > 1.2 * on_gpu["popularity"]
    assert on_gpu["model"] == pytest.approx(on_cpu["model"], rel=0.15)
    assert on_gpu["index"] == pytest.approx(on_gpu["model"], abs=1e-4)


def test_training_on_the_gpu_goes_on_after_its_last_epoch(folder: Path) -> None:
    config = _config(folder, "parts")
    assert [entry["epoch"] for entry in recray.train(config, until=3).history] == [1, 2, 3]
    parts, whole = recray.train(config), recray.train(_config(folder, "whole"))
    assert [entry["epoch"] for entry in parts.history] == list(range(1, 9))
    assert [e["loss"] for e in parts.history] == pytest.approx([e["loss"] for e in whole.history], rel=0.01)


def test_trials_train_on_halves_of_a_gpu(folder: Path) -> None:
    tune = {"search": "grid", "scheduler": "asha", "grace_epochs": 2, "top": 1, "seeds": 1, "gpus_per_trial": 0.5}
    config = _config(
        folder, "sweep", tune=tune | {"space": {"optim.learning_rate": {"choices": [1e-5, 3e-3, 1e-3, 1e-4]}}}
    )
    record = recray.tune(config)
    assert all(trial.status != "failed" for trial in record.trials)
    best = max(record.trials, key=lambda trial: trial.best or 0.0)
    assert best.epochs == 8 and best.values["optim.learning_rate"] >= 1e-3
    assert sum(trial.epochs for trial in record.trials) < 32
