"""Where train ends and test begins."""

from datetime import UTC, datetime

import numpy as np
import pytest

from recray.config import SplitConfig, parse_config
from recray.data import split
from recray.errors import ConfigError, DataError

DAY = 86_400_000_000
EDGES = np.arange(11, dtype=np.int64) * DAY  # ten days, ten events each
TENS = np.full(10, 10, np.int64)


def test_fractions_are_of_all_events() -> None:
    found = split.temporal(SplitConfig(valid=0.1, test=0.2), EDGES, TENS)
    assert found == split.Boundaries(7 * DAY, 8 * DAY, 10 * DAY)
    assert found.codes(np.array([0, 7 * DAY - 1, 7 * DAY, 8 * DAY - 1, 8 * DAY, 10 * DAY])).tolist() == [
        0,
        0,
        1,
        1,
        2,
        3,
    ]


def test_durations_count_back_from_the_end() -> None:
    found = split.temporal(SplitConfig(valid="12h", test="2d"), EDGES, TENS)
    assert found == split.Boundaries(8 * DAY - DAY // 2, 8 * DAY, 10 * DAY)


def test_dates_and_end() -> None:
    dates = {n: datetime(1970, 1, d, tzinfo=UTC) for n, d in [("valid_start", 4), ("test_start", 6), ("end", 9)]}
    assert split.temporal(SplitConfig(**dates), EDGES, TENS) == split.Boundaries(3 * DAY, 5 * DAY, 8 * DAY)


@pytest.mark.parametrize(
    ("text", "microseconds"), [("7d", 7 * DAY), ("1.5h", DAY // 16), ("30m", DAY // 48), ("45s", 45_000_000)]
)
def test_durations(text: str, microseconds: int) -> None:
    assert split.duration(text) == microseconds


def test_what_is_no_duration_is_seen_when_the_configuration_is_read() -> None:
    with pytest.raises(ConfigError, match=r"'7 weeks' is not a duration.*'7d'"):
        split.duration("7 weeks")
    for key in ("data.split.valid", "data.split.test", "training.half_life"):
        with pytest.raises(ConfigError, match=rf"{key}.*not a duration.*'12h'"):
            parse_config({}, [f"{key}='7 weeks'"])


@pytest.mark.parametrize(
    ("config", "has_time", "message"),
    [
        ({"test": 1.5}, True, "data.split.test = 1.5: a fraction must lie between 0 and 1"),
        ({"valid": "7d"}, False, "data.split.valid needs times.*use fractions"),
        (
            {"valid_start": datetime(1970, 1, 8), "test_start": datetime(1970, 1, 5)},
            True,
            "validation would start at 1970-01-08.*in this order",
        ),
    ],
)
def test_impossible_splits(config: dict, has_time: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split.temporal(SplitConfig(**config), EDGES, TENS, has_time)


def test_all_events_in_one_split() -> None:
    boundaries = split.temporal(SplitConfig(test_start=datetime(2050, 1, 1, tzinfo=UTC)), EDGES, TENS)
    counts = {"events_train": 1000, "events_valid": 0, "events_test": 0}
    message = r"no events fall in valid, test \(train 1,000.*from 1970-01-01.* to 1970-01-10.*test at 2050-01-01.*Set data.split"
    with pytest.raises(DataError, match=message):
        split.check(counts, 0, 9 * DAY, boundaries, has_time=True)
    with pytest.raises(DataError, match="leave_last needs users with 3 events"):
        split.check(counts, 0, 9 * DAY, None, has_time=True)


def test_draw_is_a_share_and_depends_on_the_seed() -> None:
    order = np.arange(20_000)
    first = split.Draw(0.1, seed=1).chosen(order)
    assert abs(first.mean() - 0.1) < 0.01
    assert (first[5_000:] == split.Draw(0.1, seed=1).chosen(order[5_000:])).all()
    assert abs((first & split.Draw(0.1, seed=2).chosen(order)).mean() - 0.01) < 0.005
    assert split.draw(SplitConfig(kind="given"), num_valid=5, seed=1) is None
    assert split.draw(SplitConfig(kind="given"), num_valid=0, seed=1) == split.Draw(0.1, 1)
    with pytest.raises(ConfigError, match="fraction of train events to draw"):
        split.draw(SplitConfig(kind="given", valid="1d"), num_valid=0, seed=1)
