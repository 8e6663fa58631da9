"""Which epoch a training keeps and when it ends: patience, validate_every; and that it learns as much when compiled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import recray
from helpers.configs import simulated_table
from recray.config import Config, parse_config
from recray.records import CheckpointRecord
from recray.training import launch


def _config(folder: Path, name: str, *overrides: str) -> Config:
    table = simulated_table(
        folder,
        name,
        events=6000,
        users=200,
        items=100,
        model={"name": "two_tower", "dim": 8},
        loss={"name": "softmax"},
        training={"epochs": 40, "global_batch_size": 512},
        scaling={"num_workers": 0},
    )
    return parse_config(table, [f"run.dataset={folder}/data/dataset", *overrides])


@pytest.fixture(scope="module")
def folder(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds one prepared dataset, which all runs here share."""
    folder = tmp_path_factory.mktemp("selection")
    recray.prepare(_config(folder, "data"))
    return folder


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_ends_training_and_keeps_the_best_epoch(folder: Path, patience: int) -> None:
    config = _config(folder, f"patience{patience}", "optim.learning_rate=0.1", f"training.patience={patience}")
    record, entries = _trained(config)
    values = [entry[record.metric] for entry in entries]
    assert len(values) < config.training.epochs
    assert record.value == max(values)
    assert record.epoch == values.index(max(values)) + 1
    # It ended as soon as `patience` validations in a row were no better than the best before them, and not earlier.
    waits = [sum(1 for _ in range(best, end)) for best, end in _droughts(values)]
    assert waits[-1] == patience and all(wait < patience for wait in waits[:-1])
    assert record.history == entries, "all epochs, those after the best one too"
    # Training again trains nothing.
    assert _trained(config) == (record, [])


def _trained(config: Config) -> tuple[CheckpointRecord, list[dict[str, float]]]:
    """The published checkpoint, and the entries of all epochs that were trained, those after the best one too."""
    entries: list[dict[str, float]] = []
    return launch.train(config, on_epoch=entries.append), entries


def _droughts(values: list[float]) -> list[tuple[int, int]]:
    """(epoch of a best value, last epoch before a better one) for each best value so far; epochs count from 1."""
    best = [i for i, value in enumerate(values) if value > max(values[:i], default=float("-inf"))]
    return [(i + 1, end) for i, end in zip(best, [*best[1:], len(values)], strict=True)]


def test_without_patience_every_epoch_is_trained(folder: Path) -> None:
    _, entries = _trained(_config(folder, "all", "optim.learning_rate=0.1", "training.epochs=8"))
    assert len(entries) == 8


def test_validate_every_second_epoch_and_at_the_end(folder: Path) -> None:
    record, entries = _trained(_config(folder, "second", "training.epochs=5", "training.validate_every=2"))
    assert [int(entry["epoch"]) for entry in entries] == [1, 2, 3, 4, 5]
    validated = [int(entry["epoch"]) for entry in entries if record.metric in entry]
    assert validated == [2, 4, 5]
    assert record.epoch in validated


def test_patience_counts_validations_not_epochs(folder: Path) -> None:
    # A rate this small changes no ranking: the first validation is the best one.
    overrides = ["optim.learning_rate=1e-12", "training.validate_every=2", "training.patience=2", "training.epochs=12"]
    record, entries = _trained(_config(folder, "both", *overrides))
    assert (record.epoch, len(entries)) == (2, 6)


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(folder: Path) -> None:
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    plain, compiled = (
        _trained(_config(folder, f"compile-{value}", "training.epochs=2", f"training.compile={value}"))
        for value in ("false", "true")
    )
    losses = [[entry["loss"] for entry in entries] for _, entries in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert compiled[0].value == pytest.approx(plain[0].value, abs=0.01)
