"""A retriever, its index and a ranker on one dataset: re-ranking in the report, and final lists."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import recray
from helpers.configs import simulated_table
from recray.config import Config, parse_config
from recray.data.dataset import PreparedDataset
from recray.errors import ConfigError, DataError, LineageError, StorageError
from recray.report.text import render
from recray.retrieval import embed
from recray.training import checkpoint

pytest.importorskip("faiss")


def _config(folder: Path, name: str, *overrides: str) -> Config:
    table = simulated_table(
        folder,
        name,
        data={"negatives": {}},
        model={"name": name, "dim": 8},
        training={"epochs": 1, "global_batch_size": 512},
        scaling={"num_workers": 0},
        evaluation={"k": [10], "bootstrap": 0, "baselines": ["popularity"]},
        retrieval={"k": 40},
    )
    return parse_config(table, overrides)


@pytest.fixture(scope="module")
def run(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A retriever with an index, and `retrieval.ranker`."""
    folder = tmp_path_factory.mktemp("both")
    retriever, ranker = _config(folder, "two_tower"), _config(folder, "dlrm")
    recray.prepare(retriever)
    shutil.copytree(f"{retriever.run_uri}/dataset", f"{ranker.run_uri}/dataset", symlinks=True)
    recray.train(retriever)
    recray.train(ranker)
    recray.index(retriever)
    return _config(folder, "two_tower", f"retrieval.ranker={ranker.run_uri}")


def test_the_report_says_what_ranking_adds_and_costs(run: Config) -> None:
    report = recray.evaluate(run)
    found, again = report.metrics["index"], report.metrics["reranked"]
    assert report.rerank["ndcg@10_added"] == pytest.approx(again["ndcg@10"].value - found["ndcg@10"].value)
    ceiling = report.rerank["recall@40_of_candidates"]
    assert again["recall@10"].value <= ceiling and found["recall@10"].value <= ceiling
    assert checkpoint.load_model(f"{run.retrieval.ranker}/checkpoint/current")[1].id in report.parents
    assert "re-ranking adds: recall@10" in render(report) and "recall@40 of candidates" in render(report)
    everything = recray.evaluate(parse_config(run.model_dump(mode="json"), ["retrieval.k=200", "evaluation.k=[200]"]))
    # All items as candidates: re-ranking loses none of them.
    assert everything.metrics["reranked"]["recall@200"].value == everything.metrics["model"]["recall@200"].value


def test_models_load_once_and_vectors_come_from_the_index(run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load, compute = checkpoint.load_model, embed.item_vectors

    def counted(folder: str) -> Any:
        loaded.append(folder)
        return load(folder)

    monkeypatch.setattr(checkpoint, "load_model", counted)
    monkeypatch.setattr(embed, "item_vectors", None)
    recray.evaluate(parse_config(run.model_dump(mode="json"), ["evaluation.k=[5]"]))
    assert len(loaded) == 2 == len(set(loaded))  # the retriever and the ranker
    loaded.clear()
    monkeypatch.setattr(embed, "item_vectors", compute)
    other = parse_config(run.model_dump(mode="json"), ["retrieval.sweep_users=50"])
    recray.index(other)
    recray.index(other)  # up to date
    assert len(loaded) == 1


def test_the_blend_is_between_search_and_ranker(run: Config) -> None:
    config = parse_config(run.model_dump(mode="json"), ["retrieval.item_knn_weight=1", "evaluation.k=[10,40]"])
    report = recray.evaluate(config)
    assert list(report.metrics) == ["model", "index", "blended", "reranked", "popularity"]
    assert "model + item-item baseline" in render(report)
    # The ranker orders the 40 best of the blend.
    wanted = report.metrics["blended"]["recall@40"].value
    assert report.metrics["reranked"]["recall@40"].value == report.rerank["recall@40_of_candidates"] == wanted
    chosen = recray.evaluate(config, split="valid")
    assert chosen.split == "valid" and chosen.metrics["blended"] != report.metrics["blended"]
    assert Path(run.run_uri, "report-valid", "current", "report.json").exists()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("weight", [0, 1])
@pytest.mark.parametrize("ranker", [False, True])
def test_lists_of_all_users(run: Config, tmp_path: Path, workers: int, ranker: bool, weight: int) -> None:
    overrides = [f"scaling.num_workers={workers}", f"retrieval.item_knn_weight={weight}"]
    config = parse_config(run.model_dump(mode="json"), overrides)
    if not ranker:
        config = config.model_copy(update={"retrieval": config.retrieval.model_copy(update={"ranker": None})})
    record = recray.recommend(config, str(tmp_path / "lists"), k=5)
    lists = pq.read_table(tmp_path / "lists")
    dataset = PreparedDataset.open(f"{run.run_uri}/dataset/current")
    users = dataset.user_keys()["user"]
    assert lists.column_names == ["user", "item", "rank", "score"]
    assert set(lists["user"].to_pylist()) == set(users.to_pylist())
    assert len(lists) == 5 * len(users) and record.counts["users"] == len(users)
    ids = {key: index for index, key in enumerate(dataset.items()["item"].to_pylist())}
    had: dict[int, set[int]] = {}
    keys = dict(zip(dataset.user_keys()["user_id"].to_pylist(), users.to_pylist(), strict=True))
    for split in ("train", "valid", "test"):
        for table in dataset.iter_tables(split):
            for row in table.to_pylist():
                chosen = {i for i, label in zip(row["item"], row["label"], strict=True) if label}
                had.setdefault(keys[row["user"]], set()).update(chosen)
    for user, group in _by_user(lists).items():
        assert [row["rank"] for row in group] == [1, 2, 3, 4, 5]
        scores = [row["score"] for row in group]
        assert scores == sorted(scores, reverse=True)
        assert not {ids[row["item"]] for row in group} & had[user]


def _by_user(lists: pa.Table) -> dict[int, list[dict]]:
    out: dict[int, list[dict]] = {}
    for row in lists.to_pylist():
        out.setdefault(row["user"], []).append(row)
    return out


def test_some_users_and_one_never_seen(run: Config, tmp_path: Path) -> None:
    dataset = PreparedDataset.open(f"{run.run_uri}/dataset/current")
    some = [*dataset.user_keys()["user"].slice(0, 3).to_pylist(), 999_999]
    pq.write_table(pa.table({"user_id": some}), tmp_path / "users.parquet")
    recray.recommend(run, str(tmp_path / "lists"), str(tmp_path / "users.parquet"), k=4)
    lists = pq.read_table(tmp_path / "lists")  # the folder as it stands
    groups = _by_user(lists)
    assert set(groups) == set(some)
    popular = dataset.items()["item"].slice(2, 4).to_pylist()  # ids go by falling count
    assert [row["item"] for row in groups[999_999]] == popular
    assert all(row["score"] is None for row in groups[999_999])
    assert pc.sum(pc.is_null(lists["score"])).as_py() == 4


def test_what_does_not_fit_is_refused(run: Config, tmp_path: Path) -> None:
    pq.write_table(pa.table({"customer": [1]}), tmp_path / "users.parquet")
    with pytest.raises(DataError, match=r"has no column 'user_id'; its columns are customer"):
        recray.recommend(run, str(tmp_path / "lists"), str(tmp_path / "users.parquet"))
    pq.write_table(pa.table({"user_id": ["a"]}), tmp_path / "users.parquet")
    with pytest.raises(DataError, match="is string, but users of the dataset are int64"):
        recray.recommend(run, str(tmp_path / "lists"), str(tmp_path / "users.parquet"))
    itself = parse_config(run.model_dump(mode="json"), [f"retrieval.ranker={run.run_uri}"])
    with pytest.raises(ConfigError, match="holds 'two_tower', which is a retriever: name the run"):
        recray.evaluate(itself)
    other = _config(tmp_path, "dlrm", "run.seed=2")
    recray.prepare(other)
    recray.train(other)
    with pytest.raises(LineageError, match=r"was trained on dataset-.*prepare with the \[data\] and run.seed of that"):
        recray.evaluate(parse_config(run.model_dump(mode="json"), [f"retrieval.ranker={other.run_uri}"]))


def test_a_folder_of_the_users_is_never_emptied(run: Config, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(StorageError, match=r"holds chapter\.txt, which recray did not write"):
        recray.recommend(run, str(tmp_path / "thesis"))
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    for _ in range(2):  # lists of an earlier call make room
        recray.recommend(run, str(tmp_path / "lists"), k=3)
