"""A retriever, its index and a ranker on one dataset: re-ranking in the report, and final lists."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import recray
from helpers.configs import simulated_table
from recray import sealed
from recray.config import Config, parse_config
from recray.data.dataset import PreparedDataset
from recray.errors import ConfigError, DataError, LineageError, StorageError
from recray.inference import LoadedRanker, LoadedRetriever
from recray.report.text import render
from recray.retrieval import embed
from recray.training import checkpoint

pytest.importorskip("faiss")


def _config(folder: Path, name: str, *overrides: str) -> Config:
    table = simulated_table(
        folder,
        name,
        data={
            "negatives": {},
            "columns": {"timestamp": "timestamp", "context": ["device", "hour"]},
            "context_features": {"device": {"kind": "categorical"}, "hour": {"kind": "categorical"}},
        },
        model={"name": name, "dim": 8, "user_embedding": False},
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
    assert report.metrics["reranked"]["recall@40"].value == pytest.approx(wanted)
    assert report.rerank["recall@40_of_candidates"] == pytest.approx(wanted)
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


def test_a_loaded_run_gives_the_lists_of_the_stage(run: Config, tmp_path: Path) -> None:
    recray.evaluate(run)
    recray.recommend(run, str(tmp_path / "lists"), k=5)
    expected = pq.read_table(tmp_path / "lists").sort_by([("user", "ascending"), ("rank", "ascending")])
    keys = pc.unique(expected["user"]).take(pa.array(range(0, 200, 7)))
    expected = expected.filter(pc.is_in(expected["user"], value_set=keys))
    model = recray.load(run.run_uri)
    assert isinstance(model, LoadedRetriever) and model.config.retrieval.ranker == run.retrieval.ranker
    found = model.recommend(users=[*keys.to_pylist(), -1], k=5)
    known = found.filter(pc.not_equal(found["user"], -1))
    assert known.drop_columns(["score"]) == expected.drop_columns(["score"])
    assert known["score"].to_numpy() == pytest.approx(expected["score"].to_numpy(), abs=1e-5)
    stranger = found.filter(pc.equal(found["user"], -1))
    assert len(stranger) == 5 and stranger["score"].null_count == 5


def test_a_history_gives_what_its_user_gets(run: Config, tmp_path: Path) -> None:
    """Also without the report, whose configuration has the ranker: then the lists are those of the index."""
    shutil.copytree(run.run_uri, tmp_path / "moved", symlinks=True)
    named = str(tmp_path / "moved" / "current.json")
    sealed.write(named, {k: v for k, v in sealed.read(named, "").items() if k != "report"})
    model = recray.load(str(tmp_path / "moved"))
    assert isinstance(model, LoadedRetriever)
    dataset = PreparedDataset.of(recray.Run(run))
    row = dataset.read(dataset.record.shards["test"][0].file).slice(0, 1)
    ids = row["item"].combine_chunks().flatten().filter(pc.greater(row["label"].combine_chunks().flatten(), 0))
    items = dataset.items()["item"].take(ids).to_pylist()
    (user,) = dataset.user_keys().filter(pc.equal(dataset.user_keys()["user_id"], row["user"][0]))["user"].to_pylist()
    here = {"device": "phone", "hour": [7]}
    by_history = model.recommend(history=[items], context=here, k=6)
    assert by_history.select(["item", "score"]) == model.recommend(users=[user], context=here, k=6).select(
        ["item", "score"]
    )
    assert by_history["user"].to_pylist() == [0] * 6 and not set(items) & set(by_history["item"].to_pylist())
    assert model.recommend(history=[items], k=6, exclude_seen=False)["item"] != by_history["item"]
    assert model.recommend(history=[[]], k=2)["score"].null_count == 2
    vectors = model.item_vectors(items[:3])
    stored = embed.load_vectors(f"{run.run_uri}/index/current", dataset.record.num_items)
    assert np.array_equal(vectors, stored[ids.to_numpy()[:3]])


def test_a_loaded_ranker_scores_raw_rows(run: Config) -> None:
    retriever, ranker = recray.load(run.run_uri), recray.load(str(run.retrieval.ranker))
    assert isinstance(retriever, LoadedRetriever) and isinstance(ranker, LoadedRanker)
    users = retriever.inputs.users.keys.slice(0, 20)
    lists = retriever.recommend(users=users, k=4, context={"device": "phone", "hour": 3})
    names = ranker.config.data.columns
    rows = pa.table({names.user: lists["user"], names.item: lists["item"]})
    rows = rows.append_column("device", pa.array(["phone"] * len(rows))).append_column(
        "hour", pa.array([3] * len(rows))
    )
    found = ranker.score(rows)
    logits = lists["score"].to_numpy().astype(np.float64)  # re-ranked lists have the ranker's logits as scores
    assert found == pytest.approx(1 / (1 + np.exp(-logits)), abs=1e-5)
    assert ranker.score(rows.to_pandas()) == pytest.approx(found) and ranker.score(rows.to_pylist()) == pytest.approx(
        found
    )
    odd = ranker.score([{names.user: -1, names.item: -1}, {names.user: -1, names.item: -1, "history": [-1, -2]}])
    assert np.isfinite(odd).all() and (odd > 0).all() and (odd < 1).all()
    with pytest.raises(DataError, match=f"rows have no column '{names.item}'; they have: {names.user}"):
        ranker.score([{names.user: 1}])


def test_what_a_loaded_model_cannot_know_is_said(run: Config) -> None:
    model = recray.load(run.run_uri)
    assert isinstance(model, LoadedRetriever)
    for call, message in (
        (lambda: model.recommend(users=["a"]), "user keys of the dataset are int64, and 'a' is not"),
        (lambda: model.recommend(users="abc"), "user keys are the text 'abc': give a list"),
        (lambda: model.recommend(users=[1, None]), "1 of 2 user keys are null"),
        (lambda: model.recommend(), r"either users=\[...\] or history="),
        (lambda: model.recommend(users=[1], k=0), "k = 0"),
        (lambda: model.recommend(users=[1], context={"dev": 1}), "no context feature 'dev'; it has: device, hour"),
        (lambda: model.recommend(users=[1], context={"hour": [1, 2]}), "has 2 values for 1 rows"),
        (lambda: model.recommend(users=[1], context={"hour": "x"}), "'hour' has values of type int64, and 'x' is none"),
        (lambda: model.similar_items(-5), "does not know 1 of 1 items, such as -5"),
    ):
        with pytest.raises(DataError, match=message):
            call()
    with pytest.raises(LineageError, match="holds no checkpoint"):
        recray.load(str(Path(run.run_uri).parent))


def test_a_run_can_be_moved_and_similar_items_are_those_of_the_cosine(run: Config, tmp_path: Path) -> None:
    shutil.copytree(run.run_uri, tmp_path / "else" / "where", symlinks=True)
    model = recray.load(str(tmp_path / "else" / "where"))
    assert isinstance(model, LoadedRetriever)
    keys = model.inputs.items.to_pylist()[2:]
    vectors = model.item_vectors(keys).astype(np.float64)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = unit @ unit[3]
    cosine[3] = -2
    best = np.argsort(-cosine)[:7]
    found = model.similar_items(keys[3], k=7)
    assert found["item"].to_pylist() == [keys[i] for i in best]
    assert found["score"].to_numpy() == pytest.approx(cosine[best], abs=1e-6)
