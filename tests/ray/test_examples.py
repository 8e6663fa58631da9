"""Own model, loss, source, metric and baseline: each a file outside the package, trained and reported."""

import importlib.util
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest

import recray
from recray import registry
from recray.config import Config, load_config
from recray.report.text import render

pytest.importorskip("faiss")
FOLDER = Path(__file__).parents[2] / "jobs" / "examples"
USERS, ITEMS = 120, 60


def _csv(folder: Path) -> None:
    """Two files of users who walk through the items: the next item is the last one plus one, or one at random."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    rows: list[list[str]] = [[], []]
    for user in range(USERS):
        item = int(rng.integers(ITEMS))
        for step in range(30):
            rows[user % 2].append(f"{user};{item};{1_700_000_000 + step * 3600 + user}")
            item = (item + 1) % ITEMS if rng.random() < 0.8 else int(rng.integers(ITEMS))
    for number, lines in enumerate(rows):
        (folder / f"{number}.csv").write_text("\n".join(["user_id;item_id;timestamp", *lines]) + "\n")


def _config(folder: Path, *overrides: str) -> Config:
    small = [
        "training.global_batch_size=64",
        "optim.learning_rate=0.02",
        "evaluation.k=[10]",
        "evaluation.bootstrap=20",
    ]
    paths = [f"run.output={folder}", f"data.path={folder}/logs/*.csv"]
    return load_config(str(FOLDER / "own.toml"), [*paths, *small, *overrides])


def test_each_example_is_short() -> None:
    for path in FOLDER.glob("*.py"):
        assert len(path.read_text().splitlines()) <= (70 if path.stem == "movielens_to_parquet" else 60), path


@pytest.mark.usefixtures("ray_local")
def test_own_plugins_are_trained_and_reported(tmp_path: Path) -> None:
    _csv(tmp_path / "logs")
    config = _config(tmp_path, "scaling.num_workers=0")
    assert config.run.plugins == str(FOLDER)
    record = recray.prepare(config)
    assert sum(record.counts[f"events_{split}"] for split in ("train", "valid", "test")) == USERS * 30
    checkpoint = recray.train(config)
    assert checkpoint.metric == "rbp@10" and 0 < checkpoint.value < 1
    recray.index(config)
    report = recray.evaluate(config)
    model, popularity = report.metrics["model"], report.metrics["popularity"]
    assert model["rbp@10"].value > 2 * popularity["rbp@10"].value  # the next item follows from the last one
    assert report.metrics["followers"]["hr@10"].value > popularity["hr@10"].value + 0.2
    assert "rbp@10" in render(report) and "followers" in render(report)
    assert recray.load_model(recray.Run(config).checkpoint().uri)[0].options.half_life == 3.0  # type: ignore[union-attr]


@pytest.mark.usefixtures("ray_local")
def test_own_plugins_reach_workers_of_ray_train(tmp_path: Path) -> None:
    _csv(tmp_path / "logs")
    config = _config(tmp_path, "scaling.num_workers=2", "training.epochs=1")
    recray.prepare(config)
    assert recray.train(config).value > 0


def test_a_configuration_carries_its_plugin_to_another_process(tmp_path: Path) -> None:
    from ray import cloudpickle

    config = _config(tmp_path)
    registry.pickle_by_value()
    again = pickle.loads(cloudpickle.dumps(config))
    assert again.model_dump() == config.model_dump()
    script = "import pickle, sys; print(pickle.load(sys.stdin.buffer).model.half_life)"
    sent = cloudpickle.dumps(config)
    assert subprocess.run([sys.executable, "-c", script], input=sent, capture_output=True).stdout == b"3.0\n"


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["ml-100k", "ml-1m", "ml-25m"])
def test_movielens_becomes_parquet(tmp_path: Path, name: str) -> None:
    ratings = [(1, 10, 5, 978300760), (1, 20, 3, 978300761), (2, 10, 4, 978300762)]
    if name == "ml-100k":
        files = {
            "u.data": "".join("\t".join(map(str, row)) + "\n" for row in ratings),
            "u.item": "10|Caf\xe9 Story (1995)|01-Jan-1995||http://x|0|1\n20|Untitled|||http://y|1|0\n",
        }
    elif name == "ml-1m":
        files = {
            "ratings.dat": "".join("::".join(map(str, row)) + "\n" for row in ratings),
            "movies.dat": "10::Caf\xe9 Story (1995)::Animation|Action\n20::Untitled::Action\n",
        }
    else:
        files = {
            "ratings.csv": "userId,movieId,rating,timestamp\n" + "".join(",".join(map(str, r)) + "\n" for r in ratings),
            "movies.csv": 'movieId,title,genres\n10,"Caf\xe9 Story (1995)",Animation|Action\n20,Untitled,Action\n',
        }
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        for file, text in files.items():
            archive.writestr(f"{name}/{file}", text.encode("utf-8" if name == "ml-25m" else "latin-1"))
    script = _script("movielens_to_parquet")
    script.convert(str(tmp_path / "archive.zip"), str(tmp_path / "out"))
    events = pq.read_table(tmp_path / "out" / "events.parquet")
    assert events.column_names == ["user_id", "item_id", "rating", "timestamp"]
    assert events["timestamp"].to_pylist() == [row[3] for row in ratings]
    items = pq.read_table(tmp_path / "out" / "items.parquet").to_pylist()
    assert items[0]["title"] == "Caf\xe9 Story (1995)" and items[0]["year"] == 1995 and items[1]["year"] is None
    if name != "ml-100k":
        assert items[0]["genres"] == ["Animation", "Action"]
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("x.txt", "")
    with pytest.raises(SystemExit, match=r"is no MovieLens archive: it has none of u\.data"):
        script.convert(str(tmp_path / "bad.zip"), str(tmp_path / "out"))
