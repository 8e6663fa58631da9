"""Negatives: never what the user chose by then, as popular as the draw says, the same on every run."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.dataset
import pytest

from recray.config import NegativesConfig
from recray.data import negatives
from recray.data.negatives import Sampler
from recray.metrics.clicks import METRICS, Clicks

COUNTS = np.array([400, 300, 200, 60, 40])
GLOBO = Path(__file__).parents[3] / "shared" / "data" / "globo" / "clicks"


def _log(users: int = 200, seed: int = 0) -> tuple[np.ndarray, ...]:
    """user, code, item, time; every user has 3 distinct items of 5, the last of them in a later split."""
    rng = np.random.default_rng(seed)
    item = np.concatenate([rng.choice(5, 3, replace=False) + 2 for _ in range(users)])
    return np.repeat(np.arange(users), 3), np.tile([0, 0, 2], users), item, np.tile([1, 2, 3], users)


@pytest.mark.parametrize("draw", ["popularity", "uniform", "recent", "targets"])
def test_never_what_was_chosen_by_then_but_possibly_what_comes_later(draw: str) -> None:
    user, code, item, time = _log()
    place = {"recent": time, "targets": code}.get(draw)
    recent = {} if place is None else {"place_S": np.sort(place), "item_S": item[np.argsort(place, kind="stable")]}
    sampler = Sampler(NegativesConfig(per_positive=2, draw=draw), COUNTS, **recent)
    wanted = np.ones(len(user), bool)
    source, drawn = negatives.draw(sampler, user, code, item, time, wanted, [1, 4, 0])
    later = 0
    for at, candidate in zip(source, drawn, strict=True):
        mine = user == user[at]
        assert candidate not in item[mine & (code <= code[at])]
        later += candidate in item[mine & (code > code[at])]
    assert later > 0
    again = negatives.draw(sampler, user, code, item, time, wanted, [1, 4, 0])
    assert np.array_equal(source, again[0]) and np.array_equal(drawn, again[1])
    if draw in ("popularity", "uniform"):
        assert len(source) == 2 * len(user)


def test_shares_of_the_draws() -> None:
    time = np.zeros(20_000, np.int64)
    rng = np.random.default_rng(0)
    popular = Sampler(NegativesConfig(), COUNTS).items(rng, time, time)
    assert np.bincount(popular, minlength=7)[2:] / len(time) == pytest.approx(COUNTS / COUNTS.sum(), abs=0.015)
    uniform = Sampler(NegativesConfig(draw="uniform"), COUNTS).items(rng, time, time)
    assert np.bincount(uniform, minlength=7)[2:] / len(time) == pytest.approx(np.full(5, 0.2), abs=0.015)


def test_recent_draws_from_the_last_events_before() -> None:
    config = NegativesConfig(draw="recent", recent_events=3)
    sampler = Sampler(config, COUNTS, place_S=np.arange(100), item_S=np.arange(100) % 5 + 2)
    drawn = sampler.items(np.random.default_rng(0), np.full(1000, 50), np.zeros(1000))
    assert set(drawn.tolist()) == {(t % 5) + 2 for t in (47, 48, 49)}


def test_targets_draws_from_the_targets_of_the_same_split() -> None:
    """As often as they are targets there, unknown items among them: a score of the item alone cannot tell them apart."""
    targets = [np.array([2, 2, 2, 3]), np.array([4]), np.array([1, 1, 5, 6])]  # of train, valid and test
    sampler = Sampler(NegativesConfig(draw="targets"), COUNTS, np.repeat([0, 1, 2], [4, 1, 4]), np.concatenate(targets))
    for code, own in enumerate(targets):
        drawn = sampler.items(np.random.default_rng(0), np.zeros(8000), np.full(8000, code))
        shares = np.bincount(own, minlength=7) / len(own)
        assert np.bincount(drawn, minlength=7) / len(drawn) == pytest.approx(shares, abs=0.02)


def test_repeats_get_repeats() -> None:
    """Neither a positive nor its negatives are told apart by whether the user had chosen the item before."""
    rng = np.random.default_rng(3)
    user, time = np.repeat(np.arange(300), 12), np.tile(np.arange(12) // 2, 300)  # two events at each time
    item, code = rng.integers(2, 14, len(user)), np.tile([0] * 8 + [1] * 2 + [2] * 2, 300)
    wanted = np.tile(np.arange(12) >= 4, 300)
    sampler = Sampler(NegativesConfig(per_positive=2), np.full(12, 50))
    source, drawn = negatives.draw(sampler, user, code, item, time, wanted, [1, 4, 0])
    repeats = {True: 0, False: 0}
    for at, candidate in zip(source, drawn, strict=True):
        mine = user == user[at]
        before = set(item[mine & (time < time[at])].tolist())
        assert candidate != item[at]
        assert (candidate in before) == (item[at] in before)
        repeats[item[at] in before] += 1
    assert min(repeats.values()) > 500 and len(source) == 2 * wanted.sum()


def test_unknown_items_are_negatives_where_they_are_positives() -> None:
    """Validation and test events have unknown items (id 1), train events do not; two unknown items are no repeat."""
    user, code = np.repeat(np.arange(500), 3), np.tile([0, 2, 2], 500)
    item, time = np.tile([2, 1, 1], 500), np.tile([1, 2, 3], 500)
    sampler = Sampler(NegativesConfig(draw="recent"), COUNTS, np.zeros(3, np.int64), np.array([1, 3, 4]))
    source, drawn = negatives.draw(sampler, user, code, item, time, np.ones(len(user), bool), [1])
    assert set(drawn[code[source] == 0].tolist()) == {3, 4}
    assert (drawn[code[source] == 2] == 1).mean() == pytest.approx(1 / 3, abs=0.05)


def test_a_user_who_chose_everything_has_none() -> None:
    user, item = np.zeros(5, np.int64), np.arange(2, 7)
    source, _ = negatives.draw(
        Sampler(NegativesConfig(), COUNTS), user, user, item, np.arange(5), np.ones(5, bool), [1]
    )
    assert not len(source)


@pytest.mark.skipif(not GLOBO.exists(), reason="needs the Globo click log, which is not redistributed")
def test_the_age_of_an_article_does_not_tell_negatives_from_clicks() -> None:
    """As jobs/configs/globo-din.toml draws them; by popularity over the week, age alone tells nearly all of them."""
    columns = {"user_id": "user", "click_article_id": "key", "click_timestamp": "time"}
    log = pyarrow.dataset.dataset(GLOBO, partitioning=None).to_table(columns=list(columns)).to_pandas()
    log = log.rename(columns=columns).drop_duplicates().sort_values(["user", "time"], kind="stable", ignore_index=True)
    edges = [
        datetime(2017, 10, 7, 19, tzinfo=UTC),
        datetime(2017, 10, 7, 21, tzinfo=UTC),
        datetime(2017, 10, 8, 3, tzinfo=UTC),
    ]
    code = np.searchsorted([edge.timestamp() * 1000 for edge in edges], log.time, side="right")
    log, code = log[code < 3], code[code < 3]
    target = (log.groupby("user").cumcount() >= 10).to_numpy()
    train = log[code == 0].groupby("key").time.agg(["size", "mean"]).sort_values("size", ascending=False)
    item = train.index.get_indexer(log.key) + 2  # where the key is not found, -1 + 2 is the unknown item
    user, time = log.user.factorize()[0], log.time.to_numpy()
    last = log.groupby("user").time.shift().to_numpy()
    written = np.concatenate([np.full(2, train["mean"].median()), train["mean"]])
    recent = np.argsort(time[target], kind="stable")
    for draw, low, high in (("popularity", 0.85, 1.0), ("recent", 0.47, 0.53)):
        sample = (time[target][recent], item[target][recent]) if draw == "recent" else (None, None)
        config = NegativesConfig(draw=draw, recent_events=1000)
        sampler = Sampler(config, train["size"].to_numpy(), *sample)
        source, drawn = negatives.draw(sampler, user, code, item, time, target & (code == 2), [1])
        positive = np.flatnonzero(target & (code == 2))
        score = -np.abs(written[np.concatenate([item[positive], drawn])] - last[np.concatenate([positive, source])])
        label = np.repeat([1.0, 0.0], [len(positive), len(drawn)])
        auc = Clicks(np.arange(len(label)), score, label).metrics(metrics={"auc": METRICS["auc"]})["auc"]
        assert low < auc < high, (draw, auc)
