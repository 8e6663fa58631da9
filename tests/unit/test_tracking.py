"""Tracking: what trackers get, that they change nothing, and real TensorBoard and MLflow (where they are installed)."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

import recray
from helpers.configs import REPOSITORY
from helpers.inline_tasks import inline_prepare
from helpers.small_run import small_config
from recray import tracking
from recray.artifacts import Run
from recray.config import Config, parse_config
from recray.errors import ConfigError
from recray.records import CheckpointRecord, ReportRecord
from recray.tracking.ray_metrics import gauge_name

TRACKER = """
import json, time
from recray.config import TrackerOptions

class Options(TrackerOptions):
    file: str = "calls.jsonl"
    fails: str = ""

class Mine:
    def __init__(self, options, run):
        self.options = options
        self.put("start", {"identity": run.identity, "tags": run.tags, "parameters": run.parameters})
    def put(self, what, value):
        if self.options.fails == what:
            raise RuntimeError(f"no {what} today")
        if self.options.fails == f"slow {what}":
            time.sleep(3)
        with open(self.options.file, "a") as file:
            file.write(json.dumps([what, value]) + "\\n")
    def metrics(self, values, step): self.put("metrics", [step, values])
    def files(self, uris): self.put("files", uris)
    def close(self, status): self.put("close", status)

def build(options, run):
    return Mine(options, run)
"""


def _config(folder: Path, name: str, *trackers: str, **options: Any) -> Config:
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(TRACKER)
    table = small_config(folder / name, "training.epochs=2").model_dump(mode="json", exclude_unset=True)
    table["run"] |= {"plugins": str(folder)}
    table["tracking"] = {"trackers": list(trackers), "options": {"mine": {"file": f"{folder}/{name}.jsonl"} | options}}
    return parse_config(table)


def _made(config: Config) -> tuple[CheckpointRecord, ReportRecord]:
    inline_prepare(config)
    record = recray.train(config)
    recray.index(config)
    return record, recray.evaluate(config)


def _calls(folder: Path, name: str) -> list[list[Any]]:
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_tracker_gets_everything_and_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracked, report = _made(_config(tmp_path, "tracked", "mine"))
    plain, _ = _made(_config(tmp_path, "plain"))
    assert tracked.files["model.safetensors"] == plain.files["model.safetensors"]
    assert tracked.identity == plain.identity
    calls = _calls(tmp_path, "tracked")
    assert [what for what, _ in calls if what != "metrics"] == ["start", "close", "start", "files", "close"]
    start = calls[0][1]
    assert start["identity"] == tracked.identity
    assert start["tags"]["recray.dataset"] == tracked.parents[0]
    assert start["parameters"]["model.dim"] == "8"
    sent = [value for what, value in calls if what == "metrics"]
    steps = tracked.step // 2
    for number, entry in enumerate(tracked.history, 1):
        values = next(values for step, values in sent if "train/epoch_loss" in values and step == number * steps)
        assert values["train/epoch_loss"] == entry["loss"]
        assert values[f"validation/{tracked.metric}"] == entry[tracked.metric]
    losses = [(step, values["train/loss"]) for step, values in sent if "train/loss" in values]
    assert [step for step, _ in losses] == list(range(1, tracked.step + 1))  # an epoch has fewer than 20 steps
    step, values = next((step, values) for step, values in sent if any(name.startswith("test/") for name in values))
    assert step == tracked.step
    assert values["test/model/ndcg@10"] == report.metrics["model"]["ndcg@10"].value
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING and "tracking" in one.name]
    # The dashboard draws values that are sent.
    gauges = {gauge_name(name) for _, values in sent for name in values} | {"recray_step"}
    drawn = set(re.findall(r"ray_(recray_\w+)", (REPOSITORY / "cluster/grafana.json").read_text()))
    assert drawn - {"recray_validation_"} <= gauges and "recray_validation_ndcg_at_10" in gauges


@pytest.mark.parametrize("fails", ["start", "metrics", "close", "slow metrics"])
def test_a_tracker_that_fails_ends_no_training(
    fails: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_CLOSE_SECONDS", 0.5)
    config = _config(tmp_path, "run", "mine", fails=fails)
    inline_prepare(config)
    with caplog.at_level(logging.WARNING, "recray"):
        logging.getLogger("recray").addHandler(caplog.handler)
        record = recray.train(config)
        logging.getLogger("recray").removeHandler(caplog.handler)
    assert record.epoch
    said = [one.getMessage() for one in caplog.records if one.name == "recray.tracking"]
    assert len(set(said)) == 1
    assert (
        "too slow" if fails.startswith("slow") else f"mine failed and is left out: RuntimeError: no {fails}"
    ) in said[0]


def test_only_worker_0_tracks_and_unknown_trackers_are_refused(tmp_path: Path) -> None:
    config = _config(tmp_path, "run", "mine")
    inline_prepare(config)
    dataset = Run(config).dataset()
    with tracking.training(config, dataset.record, dataset.uri, "runs/x/checkpoint/12345678", rank=1):
        tracking.metrics({"train/loss": 1.0}, 1)
    assert _calls(tmp_path, "run") == []
    with pytest.raises(ConfigError, match="unknown tracker 'mlfow'; did you mean 'mlflow'"):
        parse_config({"tracking": {"trackers": ["mlfow"]}})
    with pytest.raises(ConfigError, match=r"tracking\.options\.mlflow\.url"):
        parse_config({"tracking": {"options": {"mlflow": {"url": "x"}}}})


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="recray[tensorboard] is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = _config(tmp_path, "run", "tensorboard")
    record, report = _made(config)
    events = EventAccumulator(f"{config.run_uri}/tensorboard/{record.identity}").Reload()
    found = events.Scalars(f"validation/{record.metric}")
    steps = record.step // 2
    assert [one.step for one in found] == [steps, 2 * steps]
    assert [one.value for one in found] == pytest.approx([entry[record.metric] for entry in record.history])
    assert events.Scalars("test/index/recall@10")[0].value == pytest.approx(report.metrics["index"]["recall@10"].value)


def test_mlflow_on_sqlite_leads_back_to_the_raw_files(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="recray[mlflow] is not installed")
    from mlflow import MlflowClient

    from helpers.small_logs import events, write

    rows = 900
    log = events(rows, user_id=[i % 30 for i in range(rows)], item_id=[i * 7 % 41 for i in range(rows)])
    path = write(tmp_path / "log" / "day.parquet", log)
    table = {
        "run": {"output": str(tmp_path / "runs"), "name": "news"},
        "data": {"path": path, "columns": {"timestamp": "timestamp"}},
        "model": {"dim": 8},
        "training": {"epochs": 2, "global_batch_size": 256},
        "scaling": {"num_workers": 0},
        "evaluation": {"bootstrap": 0, "k": [10]},
        "tracking": {"trackers": ["mlflow"]},
    }
    config = parse_config(table)
    record, report = _made(config)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("recray")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1  # training and evaluation are one run
    run = runs[0]
    assert run.info.status == "FINISHED" and run.info.run_name == f"news-{record.identity}"
    assert run.data.params["model.dim"] == "8"
    history = client.get_metric_history(run.info.run_id, "validation/ndcg_at_10")
    assert [one.value for one in history] == [entry["ndcg@10"] for entry in record.history]
    assert [one.step for one in history] == [record.step // 2, record.step]
    assert run.data.metrics["test/model/ndcg_at_10"] == report.metrics["model"]["ndcg@10"].value
    assert {one.path for one in client.list_artifacts(run.info.run_id)} >= {"report.json"}
    assert path in run.data.tags["recray.inputs"]
    assert run.data.tags["recray.dataset"] == Run(config).dataset().record.id
    assert run.inputs.dataset_inputs[0].dataset.name == "news"
    assert not (Path.cwd() / "mlruns").exists()
