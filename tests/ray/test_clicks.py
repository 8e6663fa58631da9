"""Click ranking on built-in data: negatives made in prepare, every stage, with Ray and without."""

import shutil
from pathlib import Path

import pytest

import recray
from helpers.configs import simulated_table
from helpers.runs import selection
from recray.config import Config, parse_config
from recray.data.dataset import PreparedDataset
from recray.errors import ConfigError, DataError, LineageError
from recray.records import CheckpointRecord
from recray.report.text import render
from recray.retrieval.events import event_counts


def _config(folder: Path, *overrides: str) -> Config:
    table = simulated_table(
        folder,
        "clicks",
        events=12_000,
        data={"min_history": 2, "negatives": {"per_positive": 2}},
        model={"name": "din", "dim": 8, "hidden": [32, 16]},
        optim={"learning_rate": 5e-3},
        training={"epochs": 2, "global_batch_size": 512},
        evaluation={"bootstrap": 50},
    )
    return parse_config(table, overrides)


@pytest.fixture(scope="module")
def run(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = _config(tmp_path_factory.mktemp("clicks"), "scaling.num_workers=0")
    recray.prepare(config)
    recray.train(config)
    return config


def test_events_that_are_no_targets_are_kept_for_baselines(run: Config) -> None:
    dataset = PreparedDataset.of(recray.Run(run))
    counts = event_counts(dataset, ["train"])
    assert dataset.record.early["train"] and counts.sum() > dataset.record.counts["events_train"]
    assert (counts == dataset.item_counts()).all()  # of the catalogue, which is counted before rows are cut


def _losses(config: Config) -> list[float]:
    folder = selection(config).folder(config.training.epochs)
    return [entry["loss"] for entry in CheckpointRecord.read(folder).history]


def _with_dataset(run: Config, folder: Path, *overrides: str) -> Config:
    config = _config(folder, *overrides)
    shutil.copytree(f"{run.run_uri}/dataset", f"{config.run_uri}/dataset", symlinks=True)
    return config


def test_rows_hold_two_negatives_for_every_target(run: Config) -> None:
    dataset = PreparedDataset.open(f"{run.run_uri}/dataset/current")
    record, missed = dataset.record, 0
    for split in ("train", "valid", "test"):
        clicks = shown = 0
        for table in dataset.iter_tables(split):
            for row in table.to_pylist():
                context = len(row["item"]) - row["num_targets"]
                assert all(label == 1 for label in row["label"][:context])
                assert split == "train" or context >= run.data.min_history
                _check_negatives(row["item"], row["time"], row["label"])
                clicks += sum(row["label"][context:])
                shown += row["num_targets"]
        assert clicks == record.counts[f"events_{split}"] == sum(s.events for s in record.shards[split])
        assert shown == clicks + record.counts[f"negatives_{split}"] == sum(s.impressions for s in record.shards[split])
        missed += 3 * clicks - shown
    # Users who chose one item only, again and again, have no other one to set beside a repeat.
    assert missed == record.counts["negatives_not_found"] < 0.01 * record.counts["events_train"]


def _check_negatives(items: list[int], times: list[int], labels: list[float]) -> None:
    """A negative stands before its positive: had before as the positive was, or never until then."""
    for at, (item, time, label) in enumerate(zip(items, times, labels, strict=True)):
        if label:
            continue
        positive = next(place for place in range(at, len(items)) if labels[place])
        before = {i for i, t, chosen in zip(items, times, labels, strict=True) if chosen and t < time}
        assert item not in (1, items[positive])
        assert (item in before) == (items[positive] in before)


def test_report_of_a_ranker(run: Config) -> None:
    report = recray.evaluate(run)
    model, popularity = report.metrics["model"], report.metrics["popularity"]
    assert report.kind == "clicks"
    # Negatives were drawn by popularity; what a user chose is left out of them, so it is a little more popular.
    assert 0.5 < popularity["auc"].value < 0.65
    assert model["auc"].value > popularity["auc"].value + 0.03
    # Two drawn negatives for each click say nothing of how often items are clicked.
    assert not report.reliability and not {"ece", "log_loss", "normalized_entropy"} & model.keys()
    assert "no calibration: negatives were drawn" in render(report)
    assert any("than popularity: auc" in line for line in report.verdict)


def test_two_tasks_report_what_one_process_reports(run: Config) -> None:
    alone = recray.evaluate(run)
    shared = recray.evaluate(parse_config(run.model_dump(mode="json"), ["scaling.num_workers=2"]))
    assert shared.metrics == alone.metrics


@pytest.mark.slow  # test_pipeline.py asks the same of a retriever
def test_one_ray_worker_gives_the_losses_of_the_loop_without_ray(run: Config, tmp_path: Path) -> None:
    config = _with_dataset(run, tmp_path, "scaling.num_workers=1", "scaling.reader=ray_data")
    record = recray.train(config)
    assert _losses(config) == pytest.approx(_losses(run), rel=1e-5)
    assert record.metric == "auc" and record.value == pytest.approx(recray.train(run).value, abs=1e-6)


@pytest.mark.slow  # test_pipeline.py asks the same of a retriever
def test_two_workers_learn_as_much(run: Config, tmp_path: Path) -> None:
    config = _with_dataset(run, tmp_path, "scaling.num_workers=2")
    record, one = recray.train(config), recray.train(run)
    assert (record.rows, record.step) == (one.rows, one.step)
    # Other rows share a batch, which tells in the first steps.
    assert _losses(config)[-1] == pytest.approx(_losses(run)[-1], rel=0.03)
    assert record.value == pytest.approx(one.value, abs=0.02)


def test_a_retriever_learns_from_the_same_dataset_and_never_from_negatives(run: Config, tmp_path: Path) -> None:
    config = _with_dataset(
        run, tmp_path, "model.name=two_tower", "scaling.num_workers=0", "training.epochs=1", "model.hidden=[]"
    )
    events = sum(
        shard.events for shard in PreparedDataset.open(f"{config.run_uri}/dataset/current").record.shards["train"]
    )
    assert recray.train(config).rows == events


def test_what_does_not_fit_is_refused(run: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'din' is a ranker and has no item vectors"):
        recray.index(run)
    plain = _config(tmp_path, "scaling.num_workers=0")
    plain = plain.model_copy(update={"data": plain.data.model_copy(update={"negatives": None})})
    recray.prepare(plain)
    with pytest.raises(
        ConfigError, match=r"needs click labels; .* has none: set data.columns.label, or data.negatives"
    ):
        recray.train(plain)


def test_a_split_without_targets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no event of the train split has 5000 earlier ones .* lower data.min_history"):
        recray.prepare(_config(tmp_path, "data.min_history=5000"))
    assert not list(tmp_path.rglob("dataset"))


def test_a_checkpoint_of_another_dataset_is_refused(run: Config, tmp_path: Path) -> None:
    other = _config(tmp_path, "run.seed=2", "scaling.num_workers=0")
    recray.prepare(other)
    shutil.copytree(f"{run.run_uri}/checkpoint", f"{other.run_uri}/checkpoint", symlinks=True)
    with pytest.raises(LineageError, match=r"no checkpoint of this configuration.*The nearest is .*: run.seed 1 -> 2"):
        recray.evaluate(other)
