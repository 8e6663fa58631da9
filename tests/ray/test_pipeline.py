"""The whole path on built-in data: with Ray and without, one worker and two, ended and gone on with."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import recray
from helpers.configs import simulated_table
from helpers.runs import selection
from recray import storage
from recray.artifacts import Run
from recray.cluster import runtime
from recray.config import Config, parse_config
from recray.data.dataset import PreparedDataset
from recray.errors import ConfigError, LineageError
from recray.records import CheckpointRecord
from recray.retrieval.faiss_index import ItemIndex
from recray.training import checkpoint, ray_workers

pytest.importorskip("faiss")


def _config(folder: Path, *overrides: str) -> Config:
    table = simulated_table(
        folder,
        model={"name": "two_tower", "dim": 16},
        optim={"learning_rate": 0.02},
        training={"epochs": 3, "global_batch_size": 256},
        evaluation={"k": [10], "bootstrap": 50},
        retrieval={"k": 20},
    )
    return parse_config(table, overrides)


@pytest.fixture(scope="module")
def run(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A complete run without training workers."""
    config = _config(tmp_path_factory.mktemp("run"), "scaling.num_workers=0")
    recray.prepare(config)
    recray.train(config)
    recray.index(config)
    return config


def _losses(config: Config) -> list[float]:
    return [entry["loss"] for entry in last_epoch(config).history]


def last_epoch(config: Config) -> CheckpointRecord:
    return CheckpointRecord.read(selection(config).folder(config.training.epochs))


def _with_dataset(run: Config, folder: Path, *overrides: str) -> Config:
    """Another run on a copy of the same prepared dataset."""
    config = _config(folder, *overrides)
    shutil.copytree(f"{run.run_uri}/dataset", f"{config.run_uri}/dataset", symlinks=True)
    return config


def test_report_orders_popularity_model_oracle(run: Config) -> None:
    report = recray.evaluate(run)
    ndcg = {system: values["ndcg@10"].value for system, values in report.metrics.items()}
    # Measured: model 0.28, popularity 0.10; a model that keeps its first weights has about 0.03.
    assert 2 * ndcg["popularity"] < ndcg["model"] < ndcg["oracle"]
    assert ndcg["index"] == pytest.approx(ndcg["model"], abs=1e-6)
    assert report.counts["queries"] > 0


def test_stages_that_are_complete_are_reused(
    run: Config, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "recray")
    recray.prepare(run)
    recray.train(run)
    recray.index(run)
    for verb in ("prepare", "train", "index"):
        assert f"{verb}: up to date" in caplog.text
    caplog.clear()
    folder = Path(run.run.output)
    recray.index(_config(folder, "scaling.num_workers=0", "retrieval.item_knn_weight=0.5"))  # orders what is found
    assert "index: up to date" in caplog.text
    assert capfd.readouterr().out == ""  # a library is silent


def test_an_index_below_its_recall_target_is_kept_and_says_so(run: Config, caplog: pytest.LogCaptureFixture) -> None:
    """Product quantisation to 2 x 4 bits a vector cannot tell 200 items apart."""
    caplog.set_level("INFO", "recray")
    config = _config(Path(run.run.output), "scaling.num_workers=0", "retrieval.index=PQ2x4")
    record = recray.index(config)
    assert record.recall < config.retrieval.recall_target
    assert [point.setting for point in record.curve] == [{}]
    assert (
        f"below retrieval.recall_target = {config.retrieval.recall_target}" in caplog.text and "'Flat'" in caplog.text
    )
    recray.index(run)  # the link `current` names the exact index again


def test_one_ray_worker_gives_the_losses_of_the_loop_without_ray(
    run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "is_own", lambda: True)  # as after `recray train`
    config = _with_dataset(run, tmp_path, "scaling.num_workers=1", "scaling.reader=ray_data")
    record = recray.train(config)
    assert _losses(config) == pytest.approx(_losses(run), rel=1e-5)
    assert record.rows == last_epoch(run).rows


@pytest.mark.parametrize(
    ("keys", "here"), [([], True), (["scaling.reader=ray_data"], False), (["scaling.num_workers=2"], False)]
)
def test_a_single_worker_without_a_cluster_is_this_process(
    run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: list[str], here: bool
) -> None:
    class Asked(Exception): ...

    def workers(*_: object) -> None:
        raise Asked

    monkeypatch.setattr(ray_workers, "run", workers)
    config = _with_dataset(run, tmp_path, "training.epochs=1", "scaling.threads_per_worker=1", *keys)
    with pytest.raises(Asked):  # the Ray of these tests is a cluster that was joined
        recray.train(config)
    monkeypatch.setattr(runtime, "is_shared", lambda: False)
    if here:
        before = torch.get_num_threads()
        recray.train(config)
        assert torch.get_num_threads() == before
    else:
        with pytest.raises(Asked):
            recray.train(config)


def test_going_on_equals_never_having_stopped(run: Config, tmp_path: Path) -> None:
    short = _with_dataset(run, tmp_path, "scaling.num_workers=0", "training.epochs=2")
    recray.train(short)
    long = _config(tmp_path, "scaling.num_workers=0")
    recray.train(long)
    assert _losses(long) == pytest.approx(_losses(run), rel=1e-6)
    assert last_epoch(long).step == last_epoch(run).step


def test_an_index_of_another_checkpoint_is_not_used(
    run: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = _with_dataset(run, tmp_path, "scaling.num_workers=0", "training.epochs=1")
    recray.train(other)
    shutil.copytree(f"{run.run_uri}/index", f"{other.run_uri}/index", symlinks=True)
    report = recray.evaluate(other)
    assert "index" not in report.metrics
    assert "no index of this checkpoint: exact search only; `recray index` builds one" in caplog.text


def test_search_never_returns_padding_or_what_is_excluded(run: Config) -> None:
    index = ItemIndex.open(f"{run.run_uri}/index/current")
    queries = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    first, _ = index.search(queries, 10)
    assert first.min() >= 2
    offsets = np.array([0, 10, 10, 20, 20, 20])
    exclude = np.concatenate([first[0], first[2]])
    second, _ = index.search(queries, 10, (exclude, offsets))
    assert not set(first[0]) & set(second[0]) and not set(first[2]) & set(second[2])
    assert (second[1] == first[1]).all()
    everything, scores = index.search(queries, 500)
    assert (everything == 0).any() and np.isneginf(scores[everything == 0]).all()


def test_two_workers_consume_the_same_rows_and_learn_as_much(run: Config, tmp_path: Path) -> None:
    # The exact softmax draws nothing, so what differs is only which rows share a batch.
    # A small learning rate keeps that difference small.
    keys = ("loss.name=softmax", "optim.learning_rate=1e-3")
    one = _with_dataset(run, tmp_path / "one", "scaling.num_workers=0", *keys)
    two = _with_dataset(run, tmp_path / "two", "scaling.num_workers=2", "scaling.reader=ray_data", *keys)
    alone, shared = recray.train(one), recray.train(two)
    assert (shared.rows, shared.step) == (alone.rows, alone.step)
    assert _losses(two) == pytest.approx(_losses(one), rel=0.01)
    # Two standard errors of a mean of n numbers in [0, 1] (Bhatia and Davis: the variance is at most m (1 - m)).
    queries = sum(shard.rows for shard in PreparedDataset.open(f"{run.run_uri}/dataset/current").record.shards["valid"])
    noise = 2 * (alone.value * (1 - alone.value) / queries) ** 0.5
    assert shared.value == pytest.approx(alone.value, abs=noise)


def test_two_tasks_report_what_one_process_reports(run: Config, tmp_path: Path) -> None:
    alone = recray.evaluate(run)
    shared = recray.evaluate(parse_config(run.model_dump(mode="json"), ["scaling.num_workers=2"]))
    assert shared.counts == alone.counts
    for system, metrics in alone.metrics.items():
        for name, interval in metrics.items():
            assert shared.metrics[system][name].value == pytest.approx(interval.value, abs=1e-9), (system, name)


def test_refit_trains_on_validation_too_for_the_best_number_of_epochs(run: Config, tmp_path: Path) -> None:
    config = _with_dataset(run, tmp_path, "scaling.num_workers=0", "training.refit=true", "training.half_life='20d'")
    record = recray.train(config)
    selected = last_epoch(config)
    counts = recray.prepare(run).counts
    assert record.epoch == selected.best_epoch
    per_epoch = record.rows // record.epoch  # events of both splits, sampled by age
    assert counts["events_valid"] < per_epoch < counts["events_train"] + counts["events_valid"]
    assert record.value == selected.history[record.epoch - 1]["ndcg@10"]
    assert recray.train(config).id == record.id
    with pytest.raises(ConfigError, match="was also trained on the validation events"):
        recray.evaluate(config, split="valid")


def test_every_event_asked_for(run: Config, tmp_path: Path) -> None:
    config = parse_config(run.model_dump(mode="json"), ["evaluation.queries=event", "training.epochs=1"])
    with pytest.raises(LineageError, match=r"nearest is .*: evaluation.queries user -> event, training.epochs 3 -> 1"):
        recray.evaluate(config)  # validation, which chose the epoch, asked other queries
    recray.train(config)
    report = recray.evaluate(config)
    assert report.counts["queries"] == report.counts["targets"] > recray.evaluate(run).counts["queries"]


def test_vectors_exported_in_parallel_are_the_same(run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    from recray.retrieval import embed

    source, items = Run(run).checkpoint(), recray.prepare(run).num_items
    model, _ = checkpoint.load_model(source.uri)
    alone = embed.item_vectors(source, model, items)
    monkeypatch.setattr(embed, "_PARALLEL_ABOVE", 0)
    monkeypatch.setattr(embed, "_CHUNK", 64)
    assert len(alone) == items
    np.testing.assert_allclose(embed.item_vectors(source, model, items, run.scaling), alone, rtol=1e-6)


def test_a_killed_run_goes_on(run: Config, tmp_path: Path) -> None:
    """kill -9 after the first epoch is on disk; the next start trains only what is missing."""
    config = _with_dataset(run, tmp_path, "scaling.num_workers=0", "training.epochs=200")
    (tmp_path / "long.json").write_text(config.model_dump_json())
    code = (
        "import json, sys, recray; from recray import log; from recray.config import Config\n"
        "log.configure('json')\n"
        "recray.train(Config.model_validate(json.load(open(sys.argv[1]))))"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "long.json")], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        seen = next(line for line in child.stdout if b"epoch 1/200" in line)
        child.kill()
    assert seen and not storage.exists(f"{config.run_uri}/checkpoint/current")
    done = selection(config).last_epoch()
    shorter = parse_config(config.model_dump(mode="json"), [f"training.epochs={done + 2}"])
    record = recray.train(shorter)
    assert [int(entry["epoch"]) for entry in record.history][-1] <= done + 2
    assert last_epoch(shorter).step == (done + 2) * last_epoch(run).step // 3


def test_training_stops_where_it_is_told_to_and_goes_on_on_the_same_schedule(run: Config, tmp_path: Path) -> None:
    """In two parts it is the same training as in one, with the same negatives and the same dropout."""
    keys = ["scaling.num_workers=0", "model.hidden=[16]", "model.dropout=0.2", "optim.schedule=linear"]
    whole = _with_dataset(run, tmp_path / "whole", *keys)
    parts = _with_dataset(run, tmp_path / "parts", *keys)
    expected = recray.train(whole)
    first = recray.train(parts, until=1)
    assert first.epoch == 1 and len(first.history) == 1
    assert not storage.exists(f"{parts.run_uri}/checkpoint/current")
    assert recray.train(parts, until=1) == first  # already there
    record = recray.train(parts, until=3)  # as many as there are: to the end
    known = ("epoch", "loss", "ndcg@10")
    assert [{k: e[k] for k in known} for e in record.history] == [{k: e[k] for k in known} for e in expected.history]
    assert record.value == expected.value and storage.exists(f"{parts.run_uri}/checkpoint/current")


@pytest.mark.slow
def test_a_relative_output_means_the_same_folder_to_a_worker(
    run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = _config(Path("runs"), "training.epochs=1", "scaling.num_workers=1")
    assert config.run_uri == str(tmp_path / "runs" / "small")
    shutil.copytree(f"{run.run_uri}/dataset", f"{config.run_uri}/dataset", symlinks=True)
    monkeypatch.chdir("/")  # as a worker, which starts in a folder of its own
    recray.train(config)
    assert (tmp_path / "runs" / "small" / "checkpoint" / "current" / "checkpoint.json").exists()
