"""Successive halving: who goes on, who waits, who is lifted."""

import numpy as np
import pytest

from recray.tuning.halving import Rungs


def test_rungs_lie_before_the_last_epoch() -> None:
    assert Rungs(2, 4, 24, "max").epochs == [2, 8]
    assert Rungs(1, 3, 27, "max").epochs == [1, 3, 9]
    assert Rungs(1, 3, 28, "max").epochs == [1, 3, 9, 27]
    assert Rungs(1, 1.5, 4, "max").epochs == [1, 2, 3]  # 1.5 and 2.25 are both 2
    assert Rungs(4, 4, 4, "max").epochs == [] and Rungs(1, 4, 1, "max").epochs == []


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_first_waits_until_there_is_somebody_to_be_better_than(mode: str) -> None:
    sign = 1 if mode == "max" else -1
    rungs = Rungs(1, 2, 8, mode)
    assert not rungs.reach(1, 1, sign * 0.5)
    assert rungs.lift({1}, last=False) is None
    assert rungs.reach(2, 1, sign * 0.6)  # best of two: goes on without having waited
    assert not rungs.reach(3, 1, sign * 0.55)  # room for one of three
    assert not rungs.reach(4, 1, sign * 0.1)
    assert rungs.lift({1, 4}, last=False) is None  # room for two of four, and 2 and 3 have it
    assert not rungs.reach(5, 1, sign * 0.2) and not rungs.reach(6, 1, sign * 0.3)
    assert rungs.lift({1, 4, 5, 6}, last=False) == 1  # room for three of six


def test_higher_rungs_come_first_and_nobody_is_lifted_twice_from_one() -> None:
    rungs = Rungs(1, 2, 4, "max")  # rungs at 1 and 2
    for number, value in ((1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)):
        rungs.reach(number, 1, value)
    assert not rungs.reach(4, 2, 0.4)
    assert rungs.lift({1, 2, 3, 4}, last=False) == 3  # 4 waits at rung 2, where it is alone
    assert not rungs.reach(3, 2, 0.3)
    assert rungs.lift({1, 2, 3, 4}, last=False) == 4
    assert rungs.lift({1, 2, 3}, last=False) is None


def test_a_value_is_heard_once_and_a_rung_is_not_passed_by_unseen() -> None:
    rungs = Rungs(1, 2, 16, "max")
    rungs.reach(1, 1, 0.5)
    assert rungs.reach(1, 1, 0.9) and rungs.reach(1, 1, 0.0)  # said again after an interruption
    assert rungs.reach(2, 1, 0.6)  # 0.5 is what was heard of 1
    assert not rungs.reach(3, 3, 0.1)  # validated after every third epoch: came by 1 and 2
    assert rungs.lift({3}, last=False) is None
    assert rungs.lift({3}, last=True) == 3  # alone at the second rung, and nobody else will come


@pytest.mark.parametrize("seed", range(20))
def test_at_the_end_the_best_of_every_rung_have_gone_on_and_little_else_has(seed: int) -> None:
    """One trial at a time over random curves: a share of at least 1 / factor of every rung, the best of it, went on."""
    rng = np.random.default_rng(seed)
    factor, longest, trials = 3, 20, 27
    values = rng.random((trials, longest)).cumsum(1)
    rungs = Rungs(1, factor, longest, "max")
    trained, waiting = [0] * trials, set[int]()
    new = iter(range(trials))
    while True:
        number = rungs.lift(waiting, last=False)
        number = next(new, None) if number is None else number
        number = rungs.lift(waiting, last=True) if number is None else number
        if number is None:
            break
        waiting.discard(number)
        goes_on = True
        while goes_on and trained[number] < longest:
            trained[number] += 1
            goes_on = rungs.reach(number, trained[number], values[number, trained[number] - 1])
        if trained[number] < longest:
            waiting.add(number)
    for epoch in rungs.epochs:
        came = [number for number in range(trials) if trained[number] >= epoch]
        best = sorted(came, key=lambda number: -values[number, epoch - 1])[: -(-len(came) // factor)]
        assert all(trained[number] > epoch for number in best)
    assert min(trained) == 1 and max(trained) == longest
    # All 27 came to the first rung, where 9 go on; those who were among the best at their time and are not now add to it.
    assert 9 <= sum(epochs > 1 for epochs in trained) <= 18
