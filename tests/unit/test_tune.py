"""Sweeps without Ray: what is refused, what is drawn, how many fit, and what explains the outcome."""

from typing import Any

import numpy as np
import pytest

from recray.config import Config, parse_config
from recray.errors import ConfigError
from recray.records import Trial, TrialEpoch, TuneRecord
from recray.tuning import resources, search
from recray.tuning.check import check
from recray.tuning.importance import importance
from recray.tuning.page import render


def _config(space: dict[str, Any], *overrides: str, **tune: Any) -> Config:
    table = {"data": {"source": "simulated"}, "model": {"name": "two_tower"}, "tune": {"space": space, **tune}}
    return parse_config(table, overrides)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "tune.space is empty"),
        ({"optim.learning_rat": {"low": 1, "high": 2}}, r"'optim.learning_rat'; did you mean 'optim.learning_rate'\?"),
        ({"optim": {"learning_rat": {"low": 1, "high": 2}}}, r"did you mean 'optim.learning_rate'\?"),
        (
            {"model.dim": {"low": 64, "high": 32}},
            '"model.dim": the range is reversed: low = 64 must be below high = 32',
        ),
        ({"model.dim": {"low": 64, "high": 64}}, '"model.dim": the range is empty'),
        ({"model.dim": {"choices": []}}, "choices are empty"),
        ({"model.dim": {"low": 1}}, "needs low and high, or choices"),
        ({"model.dim": {"low": 1, "high": 8, "choices": [2]}}, "leave one or the other out"),
        ({"loss.temperature": {"low": 0, "high": 1, "log": True}}, "log = true needs low above 0"),
        ({"loss.temperature": {"low": -1, "high": 1}}, r"loss.temperature: Input should be greater than 0 \(given: -1"),
        ({"model.dim": {"low": 4, "high": 9, "step": 1.5}}, "takes whole numbers, and step = 1.5"),
        ({"loss.name": {"choices": ["softmax", "sofmax"]}}, r"loss.name: .*given: 'sofmax'"),
        ({"optim.schedule": {"low": 0, "high": 1}}, r"optim.schedule: "),
        ({"training.compile": {"low": 0, "high": 1}}, "is no number, so it has no range"),
        ({"data.min_user_events": {"choices": [1, 5]}}, "the dataset is prepared once for all trials"),
        ({"run.seed": {"choices": [1, 2]}}, "seeds are what tune.seeds is for"),
        ({"training.metric": {"choices": ["ndcg@5"]}}, "trials are compared by it"),
        ({"model.name": {"choices": ["two_tower", "din"]}}, "reports auc, and the sweep compares ndcg@10"),
        ({"model.dim": {"choices": [8], "when": {"model.nam": "x"}}}, "names 'model.nam', which is no key"),
        (
            {
                "loss.name": {"choices": ["bpr"]},
                "loss.calibration": {"low": 0, "high": 1, "when": {"loss.name": "gbce"}},
            },
            r"never holds: loss.name is one of \['bpr'\], never \['gbce'\]",
        ),
        (
            {
                "model.dim": {"choices": [8], "when": {"optim.name": "sgd"}},
                "optim.name": {"choices": ["sgd"], "when": {"model.dim": 8}},
            },
            "conditions of model.dim, optim.name ask for each other",
        ),
    ],
)
def test_a_space_that_cannot_be_is_refused_by_name(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(_config(space), [])


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"metric": "recall@20"}, r"tune.metric = 'recall@20' is never reported: an epoch reports ndcg@10"),
        ({"grace_epochs": 10}, r"tune.grace_epochs = 10 with training.epochs = 10: no trial could be ended early"),
        ({"search": "grid"}, r'"optim.learning_rate": a grid needs choices, or low and high with step'),
        ({"search": "pbt"}, r'"model.dim": cannot change while a member of search = .pbt. trains'),
    ],
)
def test_a_search_that_cannot_be_is_refused_by_name(tune: dict[str, Any], message: str) -> None:
    space = {"optim.learning_rate": {"low": 1e-4, "high": 1e-2}, "model.dim": {"choices": [8, 16]}}
    with pytest.raises(ConfigError, match=message):
        check(_config(space, **tune), [])


def test_every_problem_is_reported_at_once() -> None:
    space = {"model.dim": {"low": 2, "high": 1}, "loss.nam": {"choices": ["bpr"]}}
    config = _config(space, metric="map@3", cpus_per_trial=64)
    with pytest.raises(ConfigError) as caught:
        check(config, resources.share(config, [{"CPU": 2.0}])[1])
    assert "4 problems" in str(caught.value)
    for expected in ("'map@3'", "a trial needs 64 CPUs", "model.dim", "loss.nam"):
        assert expected in str(caught.value)


def test_a_condition_holds_or_the_key_is_left_out() -> None:
    space = {
        "loss.calibration": {"low": 0.5, "high": 1.0, "when": {"loss.name": "gbce"}},
        "loss.name": {"choices": ["gbce", "bpr"]},
        "optim.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
        "model.dim": {"low": 8, "high": 12},
    }
    drawn = check(_config(space), [])
    points = [drawn.draw(np.random.default_rng(seed)) for seed in range(400)]
    assert all(("loss.calibration" in point) == (point["loss.name"] == "gbce") for point in points)
    assert {point["model.dim"] for point in points} == {8, 9, 10, 11, 12}
    # log: as many below 10^-2.5, the middle of the exponents, as above; 400 coins, four standard deviations
    assert abs(sum(point["optim.learning_rate"] < 10**-2.5 for point in points) - 200) < 40


def test_a_grid_has_every_combination_once() -> None:
    space = {
        "loss.name": {"choices": ["gbce", "bpr"]},
        "loss.calibration": {"choices": [0.5, 0.75, 1.0], "when": {"loss.name": "gbce"}},
        "model.dim": {"low": 16, "high": 48, "step": 16},
    }
    points = list(check(_config(space, search="grid"), []).grid())
    assert len(points) == (3 + 1) * 3 == len({repr(point) for point in points})
    assert {point["model.dim"] for point in points} == {16, 32, 48}
    with pytest.raises(ConfigError, match=r"the grid has more than 5 points \(tune.trials\)"):
        check(_config(space, search="grid", trials=5), [])


def test_a_grid_is_in_its_own_order_unless_trials_are_ended_early() -> None:
    space = {"model.dim": {"low": 1, "high": 20, "step": 1}}

    def dims(**table: Any) -> list[int]:
        found = search.make(check(_config(space, search="grid", **table), []), "max", [])
        points = [found.point(number) for number in range(1, 22)]
        assert points.pop() is None
        return [point["model.dim"] for point in points if point is not None]

    whole = list(range(1, 21))
    assert dims(scheduler="none") == whole
    assert dims(scheduler="asha") == dims(scheduler="asha") != whole
    assert sorted(dims(scheduler="asha")) == whole


def test_random_search_gives_the_same_points_again_and_none_twice() -> None:
    space = check(_config({"model.dim": {"low": 1, "high": 6}}), [])
    first, second = search.make(space, "max", []), search.make(space, "max", [])
    points = [first.point(number) for number in range(1, 7)]
    assert [second.point(number) for number in (6, 1)] == [points[5], points[0]]
    assert sorted(point["model.dim"] for point in points if point) == [1, 2, 3, 4, 5, 6]
    assert first.point(7) is None


def _trial(number: int, values: dict[str, Any], best: float | None, status: Any = "done") -> Trial:
    curve = [] if best is None else [TrialEpoch(epoch=1, value=best, loss=1.0, seconds=2.0, at=float(number))]
    return Trial(number=number, values=values, seed=1, status=status, best=best, epochs=1, seconds=2.0, curve=curve)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_tpe_learns_from_records_where_the_best_is(mode: str) -> None:
    pytest.importorskip("optuna")
    space = check(
        _config({"loss.temperature": {"low": 0.1, "high": 10}, "model.dim": {"choices": [8, 16]}}, search="tpe"), []
    )
    sign = 1 if mode == "max" else -1
    begin, past = search.make(space, mode, []), []
    for number in range(1, 31):
        values = begin.point(number)
        assert values is not None
        past.append(_trial(number, values, -sign * abs(values["loss.temperature"] - 8)))
    past.append(_trial(31, {"loss.temperature": 8.0, "model.dim": 8}, None, "failed"))
    learned = search.make(space, mode, past)
    points = [learned.point(number) for number in range(32, 42)]
    assert np.median([point["loss.temperature"] for point in points if point]) > 6
    known = {"loss.temperature": 0.5, "model.dim": 16}
    assert learned.point(42, known) == known


def test_tpe_counts_a_trial_that_had_waited_once() -> None:
    optuna = pytest.importorskip("optuna")
    space = check(_config({"loss.temperature": {"low": 0.1, "high": 10}}, search="tpe"), [])
    tpe = search.make(space, "max", [])
    points = [tpe.point(number) for number in (1, 2, 3)]
    assert points[0] is not None and points[1] is not None
    for value, status in ((0.1, "paused"), (0.2, "paused"), (0.3, "done")):
        tpe.learn(_trial(1, points[0], value, status))
    tpe.learn(_trial(2, points[1], 0.2, "failed"))
    states = optuna.trial.TrialState
    study = tpe._study  # type: ignore[attr-defined]
    assert sorted(t.state.name for t in study.trials) == ["COMPLETE", "FAIL", "RUNNING"]
    (best,) = study.get_trials(states=[states.COMPLETE])
    assert best.value == 0.3 and best.params == points[0]


def _share(nodes: list[dict[str, float]], *overrides: str, **tune: Any) -> tuple[resources.Share, list[str]]:
    return resources.share(_config({"model.dim": {"choices": [8]}}, *overrides, **tune), nodes)


def test_as_many_trials_run_as_fit() -> None:
    two = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 3.0, "GPU": 1.0}]
    assert _share(two)[0] == resources.Share(1, 0.0, 7)
    assert _share(two, cpus_per_trial=2)[0].concurrent == 3
    assert _share(two, "scaling.use_gpu=true", gpus_per_trial=0.5)[0] == resources.Share(1, 0.5, 4)
    assert _share(two, "scaling.use_gpu=true")[0].concurrent == 2
    # Two workers and the trial's own process each, one CPU left for reading: (7 - 1) / 3.
    assert _share(two, "scaling.num_workers=2")[0].concurrent == 2


@pytest.mark.parametrize(
    ("overrides", "tune", "message"),
    [
        ([], {"cpus_per_trial": 3}, r"a trial needs 3 CPUs \(tune.cpus_per_trial\), but this machine has 2"),
        (["scaling.cpus_per_worker=4"], {}, r"a trial needs 4 CPUs \(scaling.cpus_per_worker\)"),
        ([], {"concurrent": 3}, "tune.concurrent = 3, but 2 such trials fit here"),
        (["scaling.use_gpu=true"], {}, "a trial needs a GPU"),
        ([], {"gpus_per_trial": 0.5}, "set scaling.use_gpu = true"),
        (["scaling.num_workers=2"], {}, r"\(2\) x scaling.cpus_per_worker \(1\) \+ 1 .* = 4 CPUs, but there are 2"),
        (["scaling.num_workers=2"], {"cpus_per_trial": 1}, "tune.cpus_per_trial is for trials of one worker"),
    ],
)
def test_what_would_wait_for_ever_is_refused(overrides: list[str], tune: dict[str, Any], message: str) -> None:
    config = _config({"model.dim": {"choices": [8]}}, *overrides, **tune)
    with pytest.raises(ConfigError, match=message):
        check(config, resources.share(config, [{"CPU": 2.0}])[1])


def test_importance_is_the_adjusted_r_squared_of_a_model_with_one_mean_a_value() -> None:
    rng = np.random.default_rng(0)
    kinds = rng.choice(["a", "b", "c"], 40)
    noise = rng.normal(size=40)
    values = (kinds == "b") * 2.0 + noise
    trials = [
        _trial(n, {"loss.name": str(kind), "model.dim": float(rng.random())}, float(value))
        for n, (kind, value) in enumerate(zip(kinds, values, strict=True))
    ]
    ranks = np.argsort(np.argsort(values)).astype(float)
    columns = (kinds[:, None] == np.array(["a", "b", "c"])).astype(float)
    residual = ranks - columns @ np.linalg.lstsq(columns, ranks, rcond=None)[0]
    r_squared = 1 - (residual**2).sum() / ((ranks - ranks.mean()) ** 2).sum()
    found = importance(trials)
    assert found["loss.name"] == pytest.approx(1 - (1 - r_squared) * 39 / 37)
    assert list(found) == ["loss.name", "model.dim"]
    assert found["model.dim"] < 0.2


def test_the_page_stands_alone_and_shows_every_trial() -> None:
    trials = [_trial(n, {"loss.name": "<bpr>" if n % 2 else "gbce", "model.dim": n}, n / 10) for n in range(1, 9)]
    trials += [_trial(9, {"model.dim": 3}, None, "failed"), _trial(10, {"model.dim": 3}, 0.2, "pruned")]
    config = {"run": {"name": "x"}, "tune": {"search": "random", "scheduler": "asha", "space": {}}}
    record = TuneRecord(
        config=config,
        metric="ndcg@10",
        mode="max",
        trials=trials,
        winner=8,
        importance={"model.dim": 0.5},
        cpu_hours=0.1,
        dataset_uri="x",
    )
    page = render(record)
    assert page.count("<svg") == 4
    assert page.count("<polyline") == 9  # a trial that reported nothing has no line
    assert page.count("<tr") == 1 + len(trials)
    assert "&lt;bpr&gt;" in page and "<bpr>" not in page
    assert "http" not in page and "<script" not in page and "nan" not in page
