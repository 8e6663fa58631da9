"""Negatives: never what the user chose by then, as popular as the draw says, the same on every run."""

import numpy as np
import pytest

from recray.config import NegativesConfig
from recray.data import negatives
from recray.data.negatives import Sampler

COUNTS = np.array([400, 300, 200, 60, 40])


def _log(users: int = 200, seed: int = 0) -> tuple[np.ndarray, ...]:
    """user, code, item, time; every user has 3 distinct items of 5, the last of them in a later split."""
    rng = np.random.default_rng(seed)
    item = np.concatenate([rng.choice(5, 3, replace=False) + 2 for _ in range(users)])
    return np.repeat(np.arange(users), 3), np.tile([0, 0, 2], users), item, np.tile([1, 2, 3], users)


@pytest.mark.parametrize("draw", ["popularity", "uniform", "recent"])
def test_never_what_was_chosen_by_then_but_possibly_what_comes_later(draw: str) -> None:
    user, code, item, time = _log()
    recent = {"time_S": np.sort(time), "item_S": item[np.argsort(time, kind="stable")]} if draw == "recent" else {}
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
    if draw != "recent":
        assert len(source) == 2 * len(user)


def test_shares_of_the_draws() -> None:
    time = np.zeros(20_000, np.int64)
    rng = np.random.default_rng(0)
    popular = Sampler(NegativesConfig(), COUNTS).items(rng, time)
    assert np.bincount(popular, minlength=7)[2:] / len(time) == pytest.approx(COUNTS / COUNTS.sum(), abs=0.015)
    uniform = Sampler(NegativesConfig(draw="uniform"), COUNTS).items(rng, time)
    assert np.bincount(uniform, minlength=7)[2:] / len(time) == pytest.approx(np.full(5, 0.2), abs=0.015)


def test_recent_draws_from_the_last_events_before() -> None:
    config = NegativesConfig(draw="recent", recent_events=3)
    sampler = Sampler(config, COUNTS, time_S=np.arange(100), item_S=np.arange(100) % 5 + 2)
    drawn = sampler.items(np.random.default_rng(0), np.full(1000, 50))
    assert set(drawn.tolist()) == {(t % 5) + 2 for t in (47, 48, 49)}


def test_a_user_who_chose_everything_has_none() -> None:
    user, item = np.zeros(5, np.int64), np.arange(2, 7)
    source, _ = negatives.draw(
        Sampler(NegativesConfig(), COUNTS), user, user, item, np.arange(5), np.ones(5, bool), [1]
    )
    assert not len(source)
