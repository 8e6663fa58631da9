"""The sources simulated and movielens through Ray Data, and `recray init`."""

from __future__ import annotations

import tomllib
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recray.config import DataConfig, parse_config
from recray.data.infer import infer
from recray.data.sources import movielens, simulated
from recray.data.sources.base import Source
from recray.errors import ConfigError, DataError, StorageError

RATINGS = [(1, 10, 5, 978300760), (1, 20, 3, 978300761), (2, 10, 4, 978300762)]


def _collected(source: Source) -> pa.Table:
    import ray

    tables = [t for t in ray.get(list(source.events.to_arrow_refs())) if t.num_rows]
    return pa.concat_tables(tables).sort_by("order")


def _archive(folder: Path, name: str) -> DataConfig:
    """A made-up archive in the format of `name`."""
    folder.mkdir(parents=True, exist_ok=True)
    if name == "ml-100k":
        flags = "|".join("1" if i in (1, 3) else "0" for i in range(19))
        (folder / "u.data").write_text("".join("\t".join(map(str, r)) + "\n" for r in RATINGS))
        items = f"10|Caf\xe9 Story (1995)|01-Jan-1995||http://x|{flags}\n20|Untitled|||http://y|{flags}\n"
        (folder / "u.item").write_bytes(items.encode("latin-1"))
        (folder / "u.user").write_text("1|24|M|technician|85711\n2|53|F|other|94043\n")
    elif name in ("ml-1m", "ml-10m"):
        encoding = "latin-1" if name == "ml-1m" else "utf-8"
        (folder / "ratings.dat").write_text("".join("::".join(map(str, r)) + "\n" for r in RATINGS))
        items = "10::Caf\xe9 Story (1995)::Animation|Action\n20::Untitled::Action\n"
        (folder / "movies.dat").write_bytes(items.encode(encoding))
        if name == "ml-1m":
            (folder / "users.dat").write_text("1::M::24::12::85711\n2::F::53::0::94043\n")
    else:
        (folder / "ratings.csv").write_text(
            "userId,movieId,rating,timestamp\n" + "".join(",".join(map(str, r)) + "\n" for r in RATINGS)
        )
        items = (
            'movieId,title,genres\n10,"Caf\xe9 Story, The (1995)",Animation|Action\n20,Untitled,(no genres listed)\n'
        )
        (folder / "movies.csv").write_text(items, encoding="utf-8")
    return DataConfig.model_validate({"source": "movielens", "path": str(folder), "movielens": {"name": name}})


@pytest.mark.parametrize("name", ["ml-100k", "ml-1m", "ml-10m", "ml-25m"])
@pytest.mark.usefixtures("ray_local")
def test_movielens(tmp_path: Path, name: str) -> None:
    source = movielens.read(_archive(tmp_path, name), 1)
    table = _collected(source)
    assert table["user"].to_pylist() == [1, 1, 2]
    assert table["item"].to_pylist() == [10, 20, 10]
    assert table["time"].to_pylist() == [r[3] * 1_000_000 for r in RATINGS]
    assert source.items is not None
    assert source.items["item"].to_pylist() == [10, 20]
    assert source.items["title"][0].as_py().startswith("Caf\xe9 Story")
    assert source.items["year"].to_pylist() == [1995, None]
    assert sorted(source.items["genres"][0].as_py()) == ["Action", "Animation"] or name == "ml-100k"
    if name in ("ml-100k", "ml-1m"):
        assert source.users is not None
        assert source.users["age"].to_pylist() == [24, 53]
        assert source.users["gender"].to_pylist() == ["M", "F"]


@pytest.mark.usefixtures("ray_local")
def test_movielens_ratings_and_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _archive(tmp_path, "ml-1m")
    changed = {"movielens": {"name": "ml-1m", "min_rating": 4}, "columns": {"weight": "rating", "context": ["rating"]}}
    config = DataConfig.model_validate({**config.model_dump(), **changed})
    table = _collected(movielens.read(config, 1))
    assert table["weight"].to_pylist() == table["rating"].to_pylist() == [5.0, 4.0]
    monkeypatch.setattr(movielens, "_CHUNK_BYTES", 7)
    uri = str(tmp_path / "ratings.dat")
    small = list(movielens._ratings(uri, movielens._FORMATS["ml-1m"]))
    assert len(small) > 1 and pa.concat_tables(small)["item"].to_pylist() == [10, 20, 10]


def test_movielens_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _archive(tmp_path / "a", "ml-1m")
    (tmp_path / "a" / "movies.dat").write_text("10::Only a title\n")
    with pytest.raises(DataError, match=r"movies\.dat, line 1"):
        movielens.read(config, 1)
    wrong = DataConfig.model_validate({**config.model_dump(), "movielens": {"name": "ml-100k"}})
    with pytest.raises(DataError, match=r"has no file 'u\.data', which ml-100k has"):
        movielens.read(wrong, 1)
    with pytest.raises(ConfigError, match="no column 'device'"):
        columns = {"context": ["device"]}
        movielens.read(DataConfig.model_validate({**config.model_dump(), "columns": columns}), 1)


def test_movielens_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import zipfile

    monkeypatch.setenv("RECRAY_CACHE", str(tmp_path / "cache"))

    def offline(*_: Any, **__: Any) -> Any:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(movielens.urllib.request, "urlopen", offline)
    with pytest.raises(StorageError, match=r"ml-1m\.zip cannot be downloaded .*set data\.path"):
        movielens.fetch("ml-1m")
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("ml-1m/ratings.dat", "1::2::3::4\n")
    monkeypatch.setattr(movielens.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(held.getvalue()))
    with pytest.raises(DataError, match="published is c4d9eecf"):
        movielens.fetch("ml-1m")
    monkeypatch.setattr(movielens, "_MD5", {})
    folder = movielens.fetch("ml-1m")
    assert folder == str(tmp_path / "cache" / "ml-1m" / "ml-1m")
    monkeypatch.setattr(movielens.urllib.request, "urlopen", offline)
    assert movielens.fetch("ml-1m") == folder


@pytest.mark.usefixtures("ray_local")
def test_simulated_through_ray() -> None:
    config = DataConfig.model_validate(
        {"source": "simulated", "simulated": {"events": 100_000, "users": 1_000, "items": 500}}
    )
    source = simulated.read(config, 5)
    table = _collected(source)
    world = simulated.World.build(config.simulated, 5)
    assert table.combine_chunks().equals(simulated.simulate(world, np.arange(1_000)).combine_chunks())
    assert source.items is not None and len(source.items) == 500
    assert simulated.read(config, 6).fingerprint != source.fingerprint


def _logged(path: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_init_finds_roles_kinds_and_unit(tmp_path: Path) -> None:
    rows = np.arange(1_000)
    events = _logged(
        tmp_path / "e.parquet",
        visitorId=[f"u{i % 50}" for i in rows],
        click_article_id=rows % 97,
        eventTime=(1_600_000_000 + rows) * 1_000,
        device=["phone", "laptop"] * 500,
        position=rows / 7,
        trace=[f"t{i}" for i in rows],
    )
    items = _logged(
        tmp_path / "i.parquet", click_article_id=np.arange(97), topic=["a"] * 50 + ["b"] * 47, tags=[["x"]] * 97
    )
    text = infer(events, items=items)
    config = parse_config(tomllib.loads(text))
    columns = config.data.columns
    assert (columns.user, columns.item, columns.timestamp) == ("visitorId", "click_article_id", "eventTime")
    assert config.data.timestamp_unit == "ms"
    assert config.data.split.kind == "temporal"
    assert {n: f.kind for n, f in config.data.item_features.items()} == {"topic": "categorical", "tags": "list"}
    assert "candidates: device, position\n" in text


def test_init_without_times(tmp_path: Path) -> None:
    path = _logged(tmp_path / "e.parquet", user_id=[1, 2], item_id=[3, 4], timestamp=[0, 1])
    config = parse_config(tomllib.loads(infer(path)))
    assert config.data.timestamp_unit == "order"
    assert config.data.split.kind == "leave_last"
    with pytest.raises(DataError, match=r"no column looks like the item id; columns there: user_id \(int64\)"):
        infer(_logged(tmp_path / "f.parquet", user_id=[1], x=[1.5]))
