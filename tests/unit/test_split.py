"""Where train ends and test begins."""

from datetime import UTC, datetime

import numpy as np
import pytest

from recray.config import SplitConfig, parse_config
from recray.data import partition, split
from recray.errors import ConfigError, DataError

KEYS = ("events", "shown", "weightless")
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


def sizes(train: int = 0, valid: int = 0, test: int = 0) -> dict[str, int]:
    chosen = {"train": train, "valid": valid, "test": test}
    return {f"{key}_{name}": n * (key != "weightless") for name, n in chosen.items() for key in KEYS}


def test_all_events_in_one_split() -> None:
    boundaries = split.temporal(SplitConfig(test_start=datetime(2050, 1, 1, tzinfo=UTC)), EDGES, TENS)
    counts = sizes(train=1000)
    message = r"no events fall in valid, test \(train 1,000.*from 1970-01-01.* to 1970-01-10.*test at 2050-01-01.*Set data.split"
    with pytest.raises(DataError, match=message):
        split.check(counts, split.Range(0, 9 * DAY, boundaries, True), None, None)
    with pytest.raises(DataError, match="leave_last needs users with 3 events"):
        split.check(counts, split.Range(0, 9 * DAY, None, True), None, None)


def test_ties_are_the_cause_of_an_empty_split() -> None:
    edges = np.arange(0, 7 * DAY, DAY // 100)
    counts = np.zeros(len(edges) - 1, np.int64)
    counts[::100] = [300, 280, 290, 270, 300, 310, 250]
    boundaries = split.temporal(SplitConfig(), edges, counts)
    found = split.Range(0, 6 * DAY, boundaries, True, split.ties(counts))
    message = (
        r"no events fall in valid, test .* Events have 7 distinct times, 310 of 2,000 share one of them, and events of the "
        r"same time are never divided: write shares as durations such as '1d'"
    )
    with pytest.raises(DataError, match=message):
        split.check(sizes(train=2000), found, None, None)
    assert split.ties(np.ones(2_000, np.int64)) == ""
    assert "no more than 1 times, which cannot be divided: use" in split.ties(np.array([0, 300, 0]))
    # The advice holds.
    days = split.temporal(SplitConfig(valid="1d", test="1d"), np.append(edges, 6 * DAY + 1), np.append(counts, 0))
    assert np.bincount(days.codes(np.arange(7) * DAY)).tolist() == [5, 1, 1]


def test_nothing_chosen_and_nothing_to_learn_from(caplog: pytest.LogCaptureFixture) -> None:
    found = split.Range(0, 9 * DAY, None, True)
    with pytest.raises(
        DataError, match=r"no events fall in test that were chosen: all 50 have label 0; check data.columns.label"
    ):
        split.check(sizes(900, 50, 0) | {"shown_test": 50}, found, "click", None)
    with pytest.raises(DataError, match=r"all 900 chosen events of train have weight 0 \(data.columns.weight = 'w'\)"):
        split.check(sizes(900, 50, 50) | {"weightless_train": 900}, found, None, "w")
    assert not caplog.records
    split.check(
        sizes(900, 50, 50) | {"weightless_test": 20, "shown_train": 1000, "shown_valid": 60}, found, "click", "w"
    )
    assert [record.getMessage()[:45] for record in caplog.records] == [
        "prepare: all 50 events of test have label 1 (",
        "prepare: 20 of 50 chosen events of test have ",
    ]


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


def test_every_time_has_a_bin() -> None:
    rng = np.random.default_rng(0)
    for most in (5, 10**6, 2**53, 2**62):
        for first, last in np.sort(rng.integers(0, most, (20, 2)), axis=1).tolist():
            edges = partition.edges(first, last)
            assert edges[0] == first and edges[-1] == last + 1 and (np.diff(edges) > 0).all()
