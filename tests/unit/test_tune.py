"""Sweeps without Ray: checks, points, resources, comparability, importance, the log and the page."""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recray.artifacts import TUNE, Run
from recray.config import Config, parse_config
from recray.errors import ConfigError
from recray.records import Finalist, Trial, TrialEpoch, TuneRecord
from recray.report import html
from recray.tuning import page, study
from recray.tuning.check import check
from recray.tuning.console import Board, summary
from recray.tuning.importance import importance, unmeasured
from recray.tuning.objective import Objective
from recray.tuning.search import make_search
from recray.tuning.trial_resources import TrialResources, plan_resources


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
        ({"model.dim": {"low": 4, "high": 9, "step": 1.5}}, "takes integers, and step = 1.5"),
        ({"loss.name": {"choices": ["softmax", "sofmax"]}}, r"loss.name: .*given: 'sofmax'"),
        ({"optim.schedule": {"low": 0, "high": 1}}, r"optim.schedule: "),
        ({"training.compile": {"low": 0, "high": 1}}, "is not a number and has no range"),
        ({"data.min_user_events": {"choices": [1, 5]}}, "the dataset is prepared once for all trials"),
        ({"run.seed": {"choices": [1, 2]}}, "tune.seeds repeats the best trials on other seeds"),
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
            "conditions of model.dim, optim.name refer to each other",
        ),
    ],
)
def test_an_invalid_space_is_refused_with_its_key(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(_config(space), [])


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"metric": "recall@20"}, r"tune.metric = 'recall@20' is never reported: an epoch reports ndcg@10"),
        ({"metric": "ndgc@10"}, r"tune.metric = 'ndgc@10': unknown metric 'ndgc'; did you mean 'ndcg'\?"),
        ({"metric": "ndcg@0"}, r"tune.metric = 'ndcg@0': write <name>@<K>"),
        ({"metric": "los"}, r"tune.metric = 'los' is never reported: .*; did you mean 'loss'\?"),
        ({"grace_epochs": 10}, r"tune.grace_epochs = 10 with training.epochs = 10: no trial could be stopped early"),
        ({"search": "grid"}, r'"optim.learning_rate": a grid needs choices, or low and high with step'),
        ({"search": "pbt"}, r'"model.dim": cannot change while a member of search = .pbt. trains'),
    ],
)
def test_an_invalid_search_is_refused_with_its_key(tune: dict[str, Any], message: str) -> None:
    space = {"optim.learning_rate": {"low": 1e-4, "high": 1e-2}, "model.dim": {"choices": [8, 16]}}
    with pytest.raises(ConfigError, match=message):
        check(_config(space, **tune), [])


def test_every_problem_is_reported_at_once() -> None:
    space = {"model.dim": {"low": 2, "high": 1}, "loss.nam": {"choices": ["bpr"]}}
    config = _config(space, metric="map@3", cpus_per_trial=64)
    with pytest.raises(ConfigError) as caught:
        check(config, plan_resources(config, [{"CPU": 2.0}])[1])
    assert "4 problems" in str(caught.value)
    for expected in ("'map@3'", "a trial needs 64 CPUs", "model.dim", "loss.nam"):
        assert expected in str(caught.value)


def test_a_key_is_drawn_if_its_condition_holds() -> None:
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
    # log: half of the draws are below 10^-2.5, the middle of the exponents; 40 of 400 is four standard deviations
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


def test_a_grid_is_in_its_own_order_unless_trials_are_stopped_early() -> None:
    space = {"model.dim": {"low": 1, "high": 20, "step": 1}}

    def dims(**table: Any) -> list[int]:
        found = make_search(check(_config(space, search="grid", **table), []), [])
        points = [found.point(number) for number in range(1, 22)]
        assert points.pop() is None
        return [point["model.dim"] for point in points if point is not None]

    whole = list(range(1, 21))
    assert dims(scheduler="none") == whole
    assert dims(scheduler="asha") == dims(scheduler="asha") != whole
    assert sorted(dims(scheduler="asha")) == whole


def test_random_search_gives_the_same_points_again_and_none_twice() -> None:
    space = check(_config({"model.dim": {"low": 1, "high": 6}}), [])
    first, second = make_search(space, []), make_search(space, [])
    points = [first.point(number) for number in range(1, 7)]
    assert [second.point(number) for number in (6, 1)] == [points[5], points[0]]
    assert sorted(point["model.dim"] for point in points if point) == [1, 2, 3, 4, 5, 6]
    assert first.point(7) is None


def _points(space: dict[str, Any], trials: int, seed: int = 1, **tune: Any) -> list[dict[str, Any]]:
    config = _config(space, f"run.seed={seed}", trials=trials, **tune)
    search = make_search(check(config, []), [])
    return [point for number in range(1, trials + 1) if (point := search.point(number)) is not None]


@pytest.mark.parametrize("seed", range(1, 9))
def test_random_points_are_stratified_after_every_trial(seed: int) -> None:
    """Counts of a key's values differ by at most one in every prefix; of a range every n-th part has one of n points."""
    space = {
        "model.normalize": {"choices": [True, False]},
        "loss.name": {"choices": ["gbce", "bpr", "softmax"]},
        "loss.temperature": {"low": 0.1, "high": 2.1},
        "optim.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
        "model.history_length": {"low": 1, "high": 500},
    }
    points = _points(space, 12, seed)
    for key, values in (("model.normalize", (True, False)), ("loss.name", ("gbce", "bpr", "softmax"))):
        for end in range(1, 13):
            counts = [sum(point[key] == value for point in points[:end]) for value in values]
            assert max(counts) - min(counts) <= 1
    places = [
        [(point["loss.temperature"] - 0.1) / 2 for point in points],
        [(np.log10(point["optim.learning_rate"]) + 4) / 3 for point in points],
        [(point["model.history_length"] - 1) / 500 for point in points],
    ]
    for place in places:
        assert sorted(int(one * 12) for one in place) == list(range(12))
    # Keys are independent: the order of one does not follow another's.
    assert all(abs(np.corrcoef(places[i], places[j])[0, 1]) < 0.85 for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_a_finite_space_is_searched_to_its_end_without_repeats(search: str) -> None:
    pytest.importorskip("optuna") if search == "tpe" else None
    space = {
        "model.normalize": {"choices": [True, False]},
        "loss.name": {"choices": ["gbce", "bpr", "softmax", "sampled_softmax"]},
        "model.dim": {"choices": [8, 16, 32]},
    }
    points = _points(space, 40, search=search)
    assert len(points) == len({repr(point) for point in points}) == 24
    for key, axis in space.items():
        for end in range(1, 25 if search == "random" else 11):
            counts = [sum(point[key] == value for point in points[:end]) for value in axis["choices"]]
            assert max(counts) - min(counts) <= 1
    conditional = {
        "loss.name": {"choices": ["gbce", "bpr"]},
        "loss.calibration": {"choices": [0.5, 0.75, 1.0], "when": {"loss.name": "gbce"}},
    }
    found = _points(conditional, 40, search=search)
    assert len(found) == len({repr(point) for point in found}) == 4


def test_a_logarithmic_integer_is_stratified_in_its_logarithm() -> None:
    dims = [
        point["model.dim"]
        for point in _points(
            {"model.dim": {"low": 1, "high": 64, "log": True}, "loss.temperature": {"low": 1, "high": 2}}, 24
        )
    ]
    place = np.sort(np.log(dims)) / np.log(64)
    assert np.abs(place - (np.arange(24) + 0.5) / 24).max() < 0.08


def test_a_resumed_search_with_more_trials_fills_what_the_first_left_open() -> None:
    space = {"loss.temperature": {"low": 0.0001, "high": 1.0}, "model.normalize": {"choices": [True, False]}}
    first = _points(space, 8)
    config = _config(space, "run.seed=1", trials=16)
    search = make_search(check(config, []), [_trial(n, point, 0.1) for n, point in enumerate(first, 1)])
    points = first + [search.point(number) or {} for number in range(9, 17)]
    assert sorted(int(point["loss.temperature"] * 16) for point in points) == list(range(16))
    assert sum(point["model.normalize"] for point in points) == 8


def test_what_was_not_varied_has_no_importance() -> None:
    trials = [_trial(n, {"model.dim": 8, "loss.name": "ab"[n % 2], "optim.name": n}, n % 2 + n / 100) for n in range(8)]
    assert list(importance(trials)) == ["loss.name", "optim.name"]
    assert unmeasured(trials) == {"model.dim": "not varied"}
    assert unmeasured(trials[:4])["loss.name"] == "too few trials"
    equal = [trial.model_copy(update={"best": 0.5}) for trial in trials]
    assert importance(equal) == {} and unmeasured(equal)["loss.name"] == "all results are equal"


def _trial(number: int, values: dict[str, Any], best: float | None, status: Any = "done") -> Trial:
    curve = [] if best is None else [TrialEpoch(epoch=1, value=best, loss=1.0, seconds=2.0, at=float(number))]
    return Trial(number=number, values=values, seed=1, status=status, best=best, epochs=1, seconds=2.0, curve=curve)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_tpe_learns_from_records_where_the_best_is(mode: str) -> None:
    pytest.importorskip("optuna")
    space = check(
        _config(
            {"loss.temperature": {"low": 0.1, "high": 10}, "model.dim": {"choices": [8, 16]}}, search="tpe", mode=mode
        ),
        [],
    )
    sign = 1 if mode == "max" else -1
    first, past = make_search(space, []), []
    for number in range(1, 31):
        values = first.point(number)
        assert values is not None
        past.append(_trial(number, values, -sign * abs(values["loss.temperature"] - 8)))
    past.append(_trial(31, {"loss.temperature": 8.0, "model.dim": 8}, None, "failed"))
    learned = make_search(space, past)
    points = [learned.point(number) for number in range(32, 42)]
    assert np.median([point["loss.temperature"] for point in points if point]) > 6
    known = {"loss.temperature": 0.5, "model.dim": 16}
    assert learned.point(42, known) == known


def test_tpe_counts_a_promoted_trial_once() -> None:
    optuna = pytest.importorskip("optuna")
    space = check(_config({"loss.temperature": {"low": 0.1, "high": 10}}, search="tpe"), [])
    tpe = make_search(space, [])
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


def _resources(nodes: list[dict[str, float]], *overrides: str, **tune: Any) -> tuple[TrialResources, list[str]]:
    return plan_resources(_config({"model.dim": {"choices": [8]}}, *overrides, **tune), nodes)


def test_as_many_trials_run_as_fit() -> None:
    two = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 3.0, "GPU": 1.0}]
    assert _resources(two)[0] == TrialResources(1, 0.0, 7)
    assert _resources(two, cpus_per_trial=2)[0].concurrent == 3
    assert _resources(two, "scaling.use_gpu=true", gpus_per_trial=0.5)[0] == TrialResources(1, 0.5, 4)
    assert _resources(two, "scaling.use_gpu=true")[0].concurrent == 2
    # Two workers and the trial's own process each, one CPU for reading: (7 - 1) / 3.
    assert _resources(two, "scaling.num_workers=2")[0].concurrent == 2


@pytest.mark.parametrize(
    ("overrides", "tune", "message"),
    [
        ([], {"cpus_per_trial": 3}, r"a trial needs 3 CPUs \(tune.cpus_per_trial\), but this machine has 2"),
        (["scaling.cpus_per_worker=4"], {}, r"a trial needs 4 CPUs \(scaling.cpus_per_worker\)"),
        ([], {"concurrent": 3}, "tune.concurrent = 3, but only 2 such trials fit"),
        (["scaling.use_gpu=true"], {}, "a trial needs a GPU"),
        ([], {"gpus_per_trial": 0.5}, "set scaling.use_gpu = true"),
        (["scaling.num_workers=2"], {}, r"\(2\) x scaling.cpus_per_worker \(1\) \+ 1 .* = 4 CPUs, but there are 2"),
        (["scaling.num_workers=2"], {"cpus_per_trial": 1}, "tune.cpus_per_trial is for trials of one worker"),
    ],
)
def test_trials_that_no_node_can_hold_are_refused(overrides: list[str], tune: dict[str, Any], message: str) -> None:
    config = _config({"model.dim": {"choices": [8]}}, *overrides, **tune)
    with pytest.raises(ConfigError, match=message):
        check(config, plan_resources(config, [{"CPU": 2.0}])[1])


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


def _record(finalists: bool = True) -> TuneRecord:
    space = {"model.dim": {"low": 1, "high": 64, "log": True}, "loss.name": {"choices": ["<bpr>", "gbce"]}}
    trials = [_trial(n, {"loss.name": "<bpr>" if n % 2 else "gbce", "model.dim": n}, n / 10) for n in range(1, 9)]
    trials += [_trial(9, {"model.dim": 3}, None, "failed"), _trial(10, {"model.dim": 3}, 0.2, "pruned")]
    finalist = Finalist(number=8, values=trials[7].values, seeds=[2, 3], results=[0.7, 0.72], mean=0.71, std=0.0141)
    return TuneRecord(
        config={"run": {"name": "x"}, "tune": {"search": "random", "scheduler": "asha", "space": space}},
        metric="ndcg@10",
        mode="max",
        trials=trials,
        finalists=[finalist] if finalists else [],
        winner=8,
        importance={"model.dim": 0.5},
        cpu_hours=0.1,
        dataset_uri="x",
    )


def test_the_page_stands_alone_and_shows_every_trial() -> None:
    pytest.importorskip("plotly")
    record = _record()
    text = page.render(record)
    figures = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert figures == [
        "The search reached ndcg@10 0.8000 in 0.090 CPU hours.",  # 9 of 10 trials reported; each took as long
        "ndcg@10 after every epoch of 9 trials.",
        "model.dim: importance 50%.",
        "loss.name: importance unknown.",
    ]
    own = text[: text.index("<script>")] + text[text.index("<main>") :]  # without plotly's script
    assert own.count('role="img" aria-label=') == len(figures) == own.count("Plotly.newPlot(")
    assert own.count("<tr") == (1 + 10) + (1 + 1)
    assert "&lt;bpr&gt;" in own and "<bpr>" not in own
    assert not re.search(r"""src=|href="(?!trials/\d{4}/")|@import|url\(|https?://""", own)
    assert '<a href="trials/0008/">8</a>' in own
    assert "default-src 'none'" in own and "prefers-color-scheme: dark" in own
    assert "0.7100 ± 0.0141" in own and "2: 0.7000 3: 0.7200" in own


def test_without_plotly_a_sweep_only_lacks_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(html.importlib.util, "find_spec", lambda name: None)
    study._write_page(_record(), str(tmp_path))
    assert not list(tmp_path.iterdir())
    assert "tune.html was not written: it needs plotly and jinja2. pip install 'recray[report]'" in caplog.text


def test_the_summary_names_finalists_importance_and_the_next_command(tmp_path: Path) -> None:
    record = _record()
    lines = summary(record, str(tmp_path)).splitlines()
    assert lines[0] == "10 trials (8 done, 1 failed, 1 pruned), 0.100 CPU hours"
    assert lines[3].split() == ["8", "0.8000", "0.7100", "+-", "0.0141", "loss.name=gbce", "model.dim=8"]
    assert "importance (variance explained by a key alone): model.dim 50%" in lines
    assert lines[-1] == f"next: recray run {tmp_path}/best.toml" and "tune.html" not in lines[-2]
    (tmp_path / "tune.html").write_text("")
    assert summary(record, str(tmp_path)).splitlines()[-2] == f"{tmp_path}/tune.html"
    assert "best: trial 8, ndcg@10 0.8000 on one seed" in summary(_record(finalists=False), str(tmp_path))


def test_a_trial_is_one_log_record(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "recray")
    with Board("search", Objective("ndcg@10", "max"), 3, [_trial(1, {"model.dim": 8}, 0.5)]) as board:
        board.running(_trial(2, {"model.dim": 16}, None))
        board.stopped(_trial(2, {"model.dim": 16}, 0.4))
    (record,) = caplog.records
    assert record.getMessage() == (
        "tune: search 2/3: trial 2 done, 1 epochs in 2.0 s  ndcg@10 0.4000  best 0.5000 of trial 1  model.dim=16"
    )
    assert record.recray_event == "trial" and record.recray_values["best"] == 0.4  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("override", "another"),
    [
        ("evaluation.filter_seen=false", True),
        ("evaluation.queries='event'", True),
        ("training.metric='recall@20'", True),
        ("run.seed=2", True),
        ("tune.scheduler='none'", True),
        ('tune.space={"model.dim" = {choices = [8, 16]}}', True),
        ("tune.trials=99", False),
        ("tune.cpus_per_trial=2", False),
        ("training.compile=true", False),
        ("retrieval.k=10", False),
    ],
)
def test_only_comparable_trials_share_a_sweep(tmp_path: Path, override: str, another: bool) -> None:
    space = {"model.dim": {"choices": [8]}}
    configs = [_config(space, f"run.output={tmp_path}", *more) for more in ([], [override])]
    first, second = (Run(config).artifact(TUNE, ["dataset-1"]).uri for config in configs)
    assert (first != second) is another
    assert Run(configs[0]).artifact(TUNE, ["dataset-2"]).uri != first


def test_without_a_cluster_the_resources_are_this_machine_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Ray is looked for or started, as another one may run on this machine."""
    monkeypatch.setattr(study.runtime, "is_own", lambda: False)
    monkeypatch.setattr(study.runtime, "is_shared", lambda: False)
    monkeypatch.setattr(study.runtime, "start", lambda scaling: pytest.fail("must not start Ray"))
    (node,) = study._nodes(_config({"model.dim": {"choices": [8]}}, "scaling.num_workers=64"))
    assert node == {"CPU": 64 * 1 + 2, "GPU": 0.0}
