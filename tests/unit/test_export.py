"""A bundle scores without recray as the training code does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import recray
from helpers.cli import recray_command
from helpers.product_log import RANKERS, RETRIEVERS, make_product_runs, product_config
from recray import folders
from recray.data.hashing import hash_keys
from recray.errors import ConfigError, DataError, LineageError, StorageError
from recray.evaluation import recommend
from recray.ids import SPLITS
from recray.inference import LoadedRanker, LoadedRetriever, artifacts_of
from recray.inference.export import _Writer, export
from recray.records import ReportRecord
from recray.retrieval.recommenders import open_recommenders

pytest.importorskip("faiss")

# What a stranger does: the bundle's own scorer, with recray out of reach.
_REPLAY = """
import runpy, sys
sys.modules["recray"] = None
for folder in sys.argv[1:]:
    sys.path.insert(0, folder)
    try:
        runpy.run_path(folder + "/score.py", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise SystemExit(f"{folder}: {end.code}")
    sys.path.pop(0)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of every model, and their bundles; `both` is the two towers with a ranker behind them."""
    folder = tmp_path_factory.mktemp("product")
    make_product_runs(folder)
    for name in (*RETRIEVERS, *RANKERS):
        found = recray_command("export", str(folder / "runs" / name), str(folder / "bundles" / name))
        assert found.code == 0, found.err
    slices = 'evaluation.slices=["country", "age", "genres"]'
    reranked = product_config(folder, "two_tower", f"retrieval.ranker={folder}/runs/din", slices)
    recray.evaluate(reranked)
    export(str(folder / "runs" / "two_tower"), str(folder / "bundles" / "both"))
    return folder


def test_the_reference_scorer_answers_as_the_training_code_does(folder: Path, tmp_path: Path) -> None:
    bundles = sorted(str(one) for one in (folder / "bundles").iterdir())
    assert len(bundles) == 7
    done = subprocess.run(
        [sys.executable, "-P", "-c", _REPLAY, *bundles], cwd=tmp_path, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("10 requests, within ") == 7
    assert len((folder / "bundles" / "both" / "score.py").read_text().splitlines()) <= 80


def test_a_damaged_answer_is_noticed(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "bundles" / "din", tmp_path / "din")
    cases = json.loads((tmp_path / "din" / "test.json").read_text())
    cases[3]["scores"][0] += 1e-3
    (tmp_path / "din" / "test.json").write_text(json.dumps(cases))
    replay = [sys.executable, "-P", "-c", _REPLAY, str(tmp_path / "din")]
    done = subprocess.run(replay, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode and "AssertionError: test.json is damaged" in done.stderr
    with pytest.raises(StorageError, match=r"test\.json is damaged"):
        recray.load(str(tmp_path / "din"))


@pytest.mark.parametrize("name", [*RETRIEVERS, "both"])
def test_a_loaded_bundle_makes_the_lists_of_the_run(folder: Path, name: str) -> None:
    uri = str(folder / "runs" / ("two_tower" if name == "both" else name))
    run = recray.load(uri)
    if name == "two_tower":  # the run's last report has a ranker by now
        artifacts, config = artifacts_of(uri)
        retrieval = config.retrieval.model_copy(update={"ranker": None})
        found = open_recommenders(
            replace(artifacts, ranker=None),
            config.model_copy(update={"retrieval": retrieval}),
            SPLITS,
            always_exact=True,
        )
        assert isinstance(run, LoadedRetriever) and found.exact is not None
        counts = artifacts.dataset.item_counts()
        run = LoadedRetriever(run.identity, config, run.inputs, found.final, found.exact, counts, catalog=run.catalog)
    bundle = recray.load(str(folder / "bundles" / name))
    assert isinstance(run, LoadedRetriever) and isinstance(bundle, LoadedRetriever)
    assert run.identity == bundle.identity
    users = [*(f"u{number}" for number in range(80)), "a stranger"]
    mine, other = (one.recommend(users=users, k=5, exclude=[["i001", "i002"]] * 81) for one in (run, bundle))
    assert mine.drop_columns(["score"]) == other.drop_columns(["score"])
    assert not {"i001", "i002"} & set(mine["item"].to_pylist())
    assert mine["score"].null_count == other["score"].null_count == 5
    np.testing.assert_allclose(mine["score"].to_numpy(), other["score"].to_numpy(), rtol=1e-5, atol=1e-5)
    context = {"device": "phone", "query": "query 7", "shop": -3, "minutes": 4.5, "price.usd": None}
    own = {"country": "se", "tags": [["t1", "no such tag"]], "age": 33}
    mine, other = (
        one.recommend(history=[["i003", "i004"]], context=context, user_features=own) for one in (run, bundle)
    )
    assert mine["item"] == other["item"]
    assert mine["score"].to_numpy() == pytest.approx(other["score"].to_numpy(), abs=1e-5)
    assert run.similar_items("i005", 3)["item"] == bundle.similar_items("i005", 3)["item"]


@pytest.mark.parametrize("name", RANKERS)
def test_a_loaded_bundle_scores_as_the_run(folder: Path, name: str) -> None:
    run, bundle = (recray.load(str(folder / kind / name)) for kind in ("runs", "bundles"))
    assert isinstance(run, LoadedRanker) and isinstance(bundle, LoadedRanker)
    log = pq.read_table(folder / "clicks").slice(0, 500)
    assert bundle.score(log) == pytest.approx(run.score(log), abs=1e-5)
    strangers = pa.table({"item_id": ["i001", "i002"], "history": [["i003"], []]})
    assert bundle.score(strangers) == pytest.approx(run.score(strangers), abs=1e-5)


def test_the_manifest_says_what_is_in_the_bundle(folder: Path) -> None:
    manifest = json.loads((folder / "bundles" / "both" / "manifest.json").read_text())
    assert sorted(manifest["programs"]) == ["item", "query", "ranker"]
    assert {"checkpoint", "dataset", "index", "ranker"} == manifest["lineage"].keys()
    query = manifest["programs"]["query"]
    assert query["history_length"] == 10 and query["output"] == {"type": "float32", "shape": ["rows", 8]}
    assert query["inputs"]["features"]["user_tags"] == {"type": "int64", "shape": ["rows", "entries"]}
    assert query["inputs"]["features"]["context_price.usd"] == {"type": "float32", "shape": ["rows"]}
    assert {"name": "minutes", "role": "context", "type": "double"} in manifest["columns"]
    assert {"name": "user_id", "role": "user key", "type": "string"} in manifest["columns"]
    files = {one.name for one in (folder / "bundles" / "both").rglob("*") if one.is_file() and one.suffix != ".pyc"}
    assert files - {"manifest.json"} == {name.rpartition("/")[2] for name in manifest["files"]}


def test_a_folder_of_other_files_is_refused_and_an_earlier_bundle_replaced(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(folder / "runs" / "wide_deep")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "users.parquet").write_text("mine")
    with pytest.raises(StorageError, match=r"holds users\.parquet, which recray did not write"):
        export(run, str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "users.parquet").read_text() == "mine"
    out = str(tmp_path / "out")
    first = export(run, out)["lineage"]["checkpoint"]["identity"]
    write = _Writer.manifest

    def looked_at(self: _Writer, programs: dict[str, Any]) -> dict[str, Any]:
        assert recray.load(out).identity == first
        return write(self, programs)

    monkeypatch.setattr(_Writer, "manifest", looked_at)
    second = export(str(folder / "runs" / "din"), out)["lineage"]["checkpoint"]["identity"]
    assert recray.load(out).identity == second != first
    monkeypatch.setattr(_Writer, "programs", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(run, out)
    assert recray.load(out).identity == second
    with pytest.raises(LineageError, match="run `recray index` first"):
        recray.train(product_config(folder, "sasrec", "run.name=bare"))
        export(str(folder / "runs" / "bare"), str(tmp_path / "bare"))
    assert not (tmp_path / "bare").exists()


def test_a_report_groups_by_declared_features(folder: Path) -> None:
    config = product_config(folder, "two_tower")
    reports = [ReportRecord.read(str(one)) for one in (folder / "runs" / "two_tower" / "report").glob("*/")]
    report = next(one for one in reports if one.config["evaluation"]["slices"])
    sizes: dict[str, dict[str, int]] = {}
    for one in report.slices:
        sizes.setdefault(one.by, {})[one.group] = one.size
    assert set(sizes["user country"]) == {"se", "no", "missing"}
    for by in ("user country", "user age"):
        assert sum(sizes[by].values()) == report.counts["queries"]
    means = [(one.size, one.values["model"].value) for one in report.slices if one.by == "user country"]
    mean = sum(size * value for size, value in means) / report.counts["queries"]
    (metric,) = {one.metric for one in report.slices if one.by == "user country"}
    assert mean == pytest.approx(report.metrics["model"][metric].value)
    assert {"g0", "missing"} <= set(sizes["item genres"]) <= {*(f"g{one}" for one in range(7)), "missing"}
    assert {one.metric for one in report.slices if one.by == "item genres"} == {f"found@{config.evaluation.k[0]}"}
    with pytest.raises(ConfigError, match=r"names 'colour', .*; there are: age, country, genres, tags, weight"):
        recray.evaluate(product_config(folder, "two_tower", 'evaluation.slices=["colour"]'))


def test_lists_that_were_killed_are_continued(folder: Path, tmp_path: Path) -> None:
    config, out = product_config(folder, "two_tower"), tmp_path / "lists"
    keys = pa.table({"user_id": [f"u{one}" for one in range(70)] + ["nobody"]})
    pq.write_table(keys, tmp_path / "users.parquet")

    def write(k: int = 3) -> dict[str, int]:
        found = recray.recommend(config, str(out), str(tmp_path / "users.parquet"), k, titles=True, own_names=True)
        return found.counts

    def read() -> list[dict[str, Any]]:
        return pq.read_table(out).to_pylist()

    assert write() == {"users": 71, "users_with_popular_items": 1}
    whole, parts = read(), sorted(out.glob("part-0*.parquet"))
    goods = {one["item_id"]: one["title"] for one in pq.read_table(folder / "items.parquet").to_pylist()}
    assert len(parts) > 1 and whole[0].keys() == {"user_id", "item_id", "rank", "score", "title"}
    assert all(one["title"] == goods[one["item_id"]] for one in whole)
    assert pq.read_schema(parts[0]).metadata[b"score"].startswith(b"the model's score: orders the items of one user")
    (out / "_lists.json").unlink()
    parts[0].unlink()
    kept = parts[1].stat().st_mtime_ns
    assert write()["users"] == 71 and read() == whole and parts[1].stat().st_mtime_ns == kept
    (out / "_lists.json").unlink()
    assert write(k=2)["users"] == 71 and {one["rank"] for one in read()} == {1, 2}
    with pytest.raises(DataError, match="has no column of titles"):
        bare = product_config(folder, "two_tower", f"data.items={folder}/users.parquet")
        recommend._Writer(bare, artifacts_of(config.run_uri)[0], "", None, 3, True, False).titles()


@pytest.mark.parametrize("at_once", [True, False])
def test_folders_change_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    if not at_once:
        monkeypatch.setattr(folders, "_exchange", lambda a, b: False)
    for name in ("first", "second"):
        (tmp_path / "new").mkdir(exist_ok=True)
        (tmp_path / "new" / name).touch()
        folders.put_in_place(str(tmp_path / "new"), str(tmp_path / "out"))
        assert [one.name for one in (tmp_path / "out").iterdir()] == [name]
    assert sorted(str(one.relative_to(tmp_path)) for one in tmp_path.rglob("*")) == [
        "new",
        "new/first",
        "out",
        "out/second",
    ]


def test_hashes_of_the_scorer_are_those_of_prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder / "bundles" / "din"))
    from encoding import hash64  # type: ignore[import-not-found]

    texts = ["", "a", "hällo", "x" * 7, "y" * 8, "z" * 15, "a longer text than two words"]
    assert [hash64(one) for one in texts] == hash_keys(pa.array(texts)).tolist()
    numbers = [0, 1, -1, -(2**63), 2**63 - 1, 123_456_789]
    assert [hash64(one) for one in numbers] == hash_keys(pa.array(numbers)).tolist()


@pytest.mark.parametrize("name", RETRIEVERS)
def test_an_explanation_is_what_the_scores_are_without_it(folder: Path, name: str) -> None:
    model = recray.load(str(folder / "bundles" / name))
    assert isinstance(model, LoadedRetriever)
    history, context = ["i003", "i017", "i004"], {"device": "phone", "minutes": 9.0}

    def score(history: list[str], context: dict[str, object], items: list[str]) -> float:
        found = model.recommend(history=[history], context=context, k=58, exclude_seen=False).to_pylist()  # type: ignore[union-attr]
        return float(np.mean([one["score"] for one in found if one["item"] in items]))

    found = {
        (one["kind"], one["name"]): one["effect"]
        for one in model.explain(history=history, context=context, k=5).to_pylist()
    }
    items = model.recommend(history=[history], context=context, k=5)["item"].to_pylist()
    whole = score(history, context, items)
    for at, item in enumerate(history):
        left = history[:at] + history[at + 1 :]
        assert found["history", item] == pytest.approx(whole - score(left, context, items), abs=1e-5)
    assert found["context", "device"] == pytest.approx(whole - score(history, {"minutes": 9.0}, items), abs=1e-5)
    assert found["user", None] == pytest.approx(0, abs=1e-6) and len(found) == 3 + 1 + 8
    with pytest.raises(DataError, match="someone without a history gets popular items"):
        model.explain(user="nobody")
