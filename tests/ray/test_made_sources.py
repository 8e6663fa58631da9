"""The source simulated through Ray Data, and `recray init`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recray.config import DataConfig, parse_config
from recray.data.infer import infer
from recray.data.sources import simulated
from recray.data.sources.base import Source
from recray.errors import DataError


def _collected(source: Source) -> pa.Table:
    import ray

    tables = [t for t in ray.get(list(source.events.to_arrow_refs())) if t.num_rows]
    return pa.concat_tables(tables).sort_by("order")


@pytest.mark.usefixtures("ray_local")
def test_simulated_through_ray() -> None:
    config = DataConfig.model_validate(
        {"source": "simulated", "simulated": {"events": 100_000, "users": 1_000, "items": 500}}
    )
    source = simulated.read(config, 5)
    table = _collected(source)
    world = simulated.World.build(config.options, 5)
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
