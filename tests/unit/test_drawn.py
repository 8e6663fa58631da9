"""Queries that are drawn where there are too many."""

import numpy as np
import pytest

from recray.loading.drawn import drawn_rows
from recray.records import Shard

SHARDS = [
    Shard(file=f"test/{i}.parquet", rows=n, events=3 * n, impressions=3 * n) for i, n in enumerate((40, 0, 7, 153))
]


@pytest.mark.parametrize(("queries", "most", "users"), [("user", 50, 50), ("event", 60, 20), ("event", 1, 1)])
def test_users_are_drawn_once_from_all_shards(queries: str, most: int, users: int) -> None:
    drawn = drawn_rows(SHARDS, most, queries, 1)
    assert drawn is not None and sum(map(len, drawn)) == users
    for rows, shard in zip(drawn, SHARDS, strict=True):
        assert len(set(rows.tolist())) == len(rows) and ((rows >= 0) & (rows < shard.rows)).all()
    again, other = drawn_rows(SHARDS, most, queries, 1), drawn_rows(SHARDS, most, queries, 2)
    assert again is not None and other is not None
    assert all(np.array_equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert users == 1 or any(not np.array_equal(a, b) for a, b in zip(drawn, other, strict=True))


def test_every_user_is_as_likely() -> None:
    drawn = [drawn_rows(SHARDS, 50, "user", seed) for seed in range(400)]
    times = np.bincount(np.concatenate([one[3] for one in drawn if one is not None]), minlength=153)
    assert abs(times.mean() - 100) < 2 and times.std() < 2 * np.sqrt(75)


@pytest.mark.parametrize("most", [None, 200, 10_000])
def test_all_are_asked_where_they_are_few(most: int | None) -> None:
    assert drawn_rows(SHARDS, most, "user", 1) is None
