"""What went wrong when a changed value reused or replaced an artefact: each fault as a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import recray
from helpers.configs import simulated_table
from helpers.runs import checkpoint_folder, selection
from recray.artifacts import CHECKPOINT, Run, artifacts_of
from recray.config import Config, parse_config
from recray.errors import LineageError


@pytest.fixture(scope="module")
def folder(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a dataset is prepared that the tests of this module share."""
    folder = tmp_path_factory.mktemp("faults")
    recray.prepare(_config(folder, folder))
    return folder


def _config(output: Path, data: Path, *overrides: str) -> Config:
    table = simulated_table(
        output,
        "small",
        events=4000,
        users=120,
        items=80,
        model={"name": "two_tower", "dim": 8},
        training={"epochs": 2, "global_batch_size": 256},
        evaluation={"k": [10], "bootstrap": 0, "baselines": ["popularity"]},
        scaling={"num_workers": 0},
    )
    return parse_config(table, [f"run.dataset={data}/small/dataset", *overrides])


def test_another_metric_selects_anew(folder: Path, tmp_path: Path) -> None:
    by_ndcg = recray.train(_config(tmp_path, folder))
    by_hits = recray.train(_config(tmp_path, folder, "training.metric=hr@20"))
    assert (by_ndcg.metric, by_hits.metric) == ("ndcg@10", "hr@20")
    assert by_hits.value == max(entry["hr@20"] for entry in by_hits.history)
    assert all("ndcg@10" not in entry for entry in by_hits.history)


@pytest.mark.parametrize("value", ["evaluation.filter_seen=false", "evaluation.queries=event"])
def test_another_question_to_validation_selects_anew(folder: Path, tmp_path: Path, value: str) -> None:
    first, second = recray.train(_config(tmp_path, folder)), recray.train(_config(tmp_path, folder, value))
    assert first.id != second.id
    pairs = [(a["ndcg@10"], b["ndcg@10"]) for a, b in zip(first.history, second.history, strict=True)]
    assert all(a != b for a, b in pairs)
    assert [a["loss"] for a in first.history] == [b["loss"] for b in second.history]  # the same training


def test_a_report_names_the_model_that_was_evaluated(folder: Path, tmp_path: Path) -> None:
    config = _config(tmp_path, folder)
    recray.train(config)
    for value in (
        "model.dim=64",
        "optim.learning_rate=0.5",
        "training.epochs=99",
        "loss.name=gbce",
        "model.name=sasrec",
    ):
        with pytest.raises(
            LineageError, match=r"no checkpoint of this configuration .* run `recray train` with it first"
        ):
            recray.evaluate(_config(tmp_path, folder, value))
    report = recray.evaluate(config)
    record = Run(config).checkpoint().record
    assert record.id in report.parents
    for section in ("model", "optim", "training", "loss"):
        assert report.config[section] == record.config[section]


def test_a_falling_schedule_with_more_epochs_is_another_training(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "recray")
    recray.train(_config(tmp_path / "a", folder, "optim.schedule=linear"))
    longer = recray.train(_config(tmp_path / "a", folder, "optim.schedule=linear", "training.epochs=4"))
    assert "resuming" not in caplog.text
    scratch = recray.train(_config(tmp_path / "b", folder, "optim.schedule=linear", "training.epochs=4"))
    assert [e["loss"] for e in longer.history] == [e["loss"] for e in scratch.history]


def test_a_constant_rate_with_more_epochs_continues(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "recray")
    short = recray.train(_config(tmp_path / "a", folder))
    longer = recray.train(_config(tmp_path / "a", folder, "training.epochs=4"))
    assert "resuming after epoch 2" in caplog.text
    scratch = recray.train(_config(tmp_path / "b", folder, "training.epochs=4"))
    known = ("epoch", "loss", "ndcg@10")
    assert [[e.get(k) for k in known] for e in longer.history] == [[e.get(k) for k in known] for e in scratch.history]
    assert longer.value == scratch.value and longer.best_epoch == scratch.best_epoch
    assert recray.train(_config(tmp_path / "a", folder)) == short  # still there, and found again


def test_another_value_does_not_destroy_a_trained_model(folder: Path, tmp_path: Path) -> None:
    good = _config(tmp_path, folder)
    record = recray.train(good)
    weights = Path(checkpoint_folder(good), "model.safetensors").read_bytes()
    recray.train(_config(tmp_path, folder, "model.dim=4", "training.epochs=1"))
    assert Path(checkpoint_folder(good), "model.safetensors").read_bytes() == weights
    assert recray.train(good) == record
    assert len(artifacts_of(f"{tmp_path}/small/checkpoint", CHECKPOINT)) == 2
    assert json.loads((tmp_path / "small/current.json").read_text())["checkpoint"] == Run(good).checkpoint().identity


def test_training_without_a_dataset_of_its_data_section_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LineageError, match=r"no dataset of this configuration .*data.min_item_events 1 -> 40"):
        recray.train(_config(tmp_path, folder, "data.min_item_events=40"))
    with pytest.raises(LineageError, match=r"no dataset of this configuration .*run.seed 1 -> 7"):
        recray.train(_config(tmp_path, folder, "run.seed=7"))


def test_starting_over_is_asked_for_by_a_key(folder: Path, tmp_path: Path) -> None:
    config = _config(tmp_path, folder)
    first = recray.train(config)
    again = recray.train(_config(tmp_path, folder, "training.resume=false"))
    assert [e["loss"] for e in again.history] == [e["loss"] for e in first.history]
    assert selection(config).last_epoch() == 2
