"""The Parquet source through Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from helpers.small_logs import DAY, START, config_of, events, write
from recray.cluster.errors import unwrapped
from recray.data.sources import parquet
from recray.errors import DataError

pytestmark = pytest.mark.usefixtures("ray_local")


def _collected(events: Any) -> pa.Table:
    import ray

    tables = [t for t in ray.get(list(events.to_arrow_refs())) if t.num_rows]
    return pa.concat_tables(tables).sort_by("order").combine_chunks()


def test_through_ray(tmp_path: Path) -> None:
    for i in range(40):
        write(tmp_path / f"part-{i:05d}.parquet", events(6, item_id=np.arange(6) + 6 * i))
    (tmp_path / "_SUCCESS").write_text("")
    source = parquet.read(config_of(str(tmp_path)), 1)
    table = _collected(source.events)
    assert table.column_names == ["user", "item", "time", "order"]
    assert table["item"].to_pylist() == list(range(240))
    assert table["time"][1].as_py() == (START + DAY) * 1_000_000
    assert source.num_events == 240
    assert source.events.materialize().num_blocks() == 1  # small files are read by one task
    assert source.has_time
    again = parquet.read(config_of(str(tmp_path)), 1)
    assert again.fingerprint == source.fingerprint
    write(tmp_path / "part-00003.parquet", events(7))
    assert parquet.read(config_of(str(tmp_path)), 1).fingerprint != source.fingerprint


def test_an_error_in_a_task_comes_out_plain(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", events())
    write(tmp_path / "b.parquet", events(user_id=pa.array([1, None, 2, None, 1, 1])))
    source = parquet.read(config_of(str(tmp_path)), 1)
    with pytest.raises(DataError, match=r"b\.parquet: column 'user_id' has 2 null ids in 6 rows"), unwrapped():
        _collected(source.events)
