"""The source simulated through Ray Data."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from recray.config import DataConfig
from recray.data.sources import simulated
from recray.data.sources.base import Source


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
