"""Checks of a sweep before anything starts: all problems at once, each with its key."""

from __future__ import annotations

import difflib
import importlib.util
import itertools
from collections.abc import Iterable

import numpy as np

from recray.config import Axis, Config, with_values
from recray.errors import ConfigError
from recray.tuning.space import Point, Space, plain, show, value_of

_SWEPT = ("model", "loss", "optim", "training")
_WHY_NOT = {
    "data": "the dataset is prepared once for all trials; run one sweep per dataset",
    "run": "all trials use the run's dataset and seed; tune.seeds repeats the best trials on other seeds",
    "scaling": "all trials use the same CPUs and GPUs; set them in [scaling] or [tune]",
    "retrieval": "it does not change what is trained",
    "evaluation": "it changes what the metric means, so trials could not be compared",
    "tune": "it controls the sweep itself",
    "training.metric": "trials are compared by it",
    "training.validate_every": "trials are compared at the same epochs",
    "training.resume": "it does not change what is trained",
    "training.refit": "trials only select values; the winner's own run refits if the configuration says so",
}
_MAX_GRID = 100_000
_TRIED_GRID, _TRIED_DRAWS = 256, 64  # complete points that are checked: a space can be endless


def check(config: Config, resource_problems: list[str]) -> Space:
    """The search space of a sweep. Raises ConfigError with every problem, `resource_problems` included."""
    tune, problems = config.tune, [*_metric(config), *resource_problems]
    if not tune.space:
        problems.append(
            "tune.space is empty: name keys and their values, e.g. "
            '"optim.learning_rate" = { low = 1e-4, high = 1e-2, log = true }'
        )
    if tune.search == "tpe" and importlib.util.find_spec("optuna") is None:
        problems.append("tune.search = 'tpe' needs Optuna: pip install 'recray[tune]', or use 'random'")
    if tune.search != "pbt" and tune.scheduler != "none" and tune.grace_epochs >= config.training.epochs > 1:
        problems.append(
            f"tune.grace_epochs = {tune.grace_epochs} with training.epochs = {config.training.epochs}: no trial could be "
            f"stopped early; lower it, or set tune.scheduler = 'none'"
        )
    axes, order_problems = _ordered(tune.space)
    problems += order_problems
    whole: set[str] = set()
    for key, axis in axes.items():
        found = [*_allowed(key), *_range(axis), *_conditions(config, axis)]
        if not found:
            found = _values(config, key, axes, whole)
        if not found and tune.search == "pbt":
            found = _population(config, key, axis)
        problems += [f'tune.space "{key}": {problem}' for problem in found]
    space = Space(config, axes, frozenset(whole))
    if not problems:
        problems = [*_grid(space), *_combinations(space)]
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"{count} with this sweep, and nothing was started:\n{lines}")
    return space


def _metric(config: Config) -> list[str]:
    metric, own = config.tune.metric, config.training.metric
    if metric in (None, "loss", own):
        return []
    problem = f"tune.metric = '{metric}' is never reported: an epoch reports {own} (training.metric) and loss"
    if difflib.get_close_matches(str(metric), ["loss"], 1):
        return [f"{problem}; did you mean 'loss'?"]
    try:
        with_values(config, {"training.metric": metric})
    except ConfigError as error:  # misspelt
        return [line.replace("training.metric", "tune.metric") for line in _lines(error)]
    return [f"{problem}; set training.metric = '{metric}' and leave tune.metric out"]


def _ordered(space: dict[str, Axis]) -> tuple[dict[str, Axis], list[str]]:
    """Every key after the keys that its conditions refer to."""
    ordered: dict[str, Axis] = {}
    while len(ordered) < len(space):
        left = {key: axis for key, axis in space.items() if key not in ordered}
        ready = {key: axis for key, axis in left.items() if not axis.when.keys() & left.keys()}
        if not ready:
            return ordered, [f"tune.space: the conditions of {', '.join(left)} refer to each other"]
        ordered |= ready
    return ordered, []


def _allowed(key: str) -> list[str]:
    reason = _WHY_NOT.get(key) or _WHY_NOT.get(key.partition(".")[0])
    allowed = ", ".join(f"[{name}]" for name in _SWEPT)
    return [f"cannot be swept: {reason}. Keys of {allowed} can"] if reason else []


def _range(axis: Axis) -> list[str]:
    low, high, step = axis.low, axis.high, axis.step
    if axis.choices is not None:
        if (low, high, step) != (None, None, None) or axis.log:
            return ["has choices as well as low, high, step or log: leave one or the other out"]
        return [] if axis.choices else ["choices are empty: name at least one value"]
    if low is None or high is None:
        return ["needs low and high, or choices"]
    if low >= high:
        return [f"the range is {'empty' if low == high else 'reversed'}: low = {low:g} must be below high = {high:g}"]
    if axis.log and low <= 0:
        return [f"log = true needs low above 0 (given: {low:g})"]
    if step is not None and axis.log:
        return ["step and log cannot be combined: use choices"]
    if step is not None and not 0 < step <= high - low:
        return [f"step = {step:g} must be above 0 and at most high - low = {high - low:g}"]
    return []


def _conditions(config: Config, axis: Axis) -> list[str]:
    problems = []
    for key, allowed in axis.when.items():
        other = config.tune.space.get(key)
        if other is None:
            try:
                value_of(config, key)
            except AttributeError:
                problems.append(f"its condition names '{key}', which is no key of this configuration or space")
        elif other.choices is not None and not any(value in other.choices for value in allowed):
            problems.append(f"its condition never holds: {key} is one of {other.choices}, never {allowed}")
    return problems


def _values(config: Config, key: str, axes: dict[str, Axis], whole: set[str]) -> list[str]:
    """Problems with bounds and choices, as the configuration reports them; adds integer keys to `whole`."""
    axis, problems = axes[key], list[str]()
    for value in [axis.low, axis.high] if axis.choices is None else axis.choices:
        try:
            parsed = value_of(with_values(config, {**_activating(axis, axes), key: value}), key)
        except ConfigError as error:
            lines = _lines(error)
            if key == "model.name":  # the message is about a key that the other model does not have
                lines = [
                    f"with '{value}': {line}. Move keys that only some models have from the file's [model] to "
                    f'tune.space, with when = {{ "model.name" = ... }}'
                    for line in lines
                ]
            problems += [line for line in lines if line not in problems]
            continue
        if axis.choices is None:
            if isinstance(parsed, bool) or not isinstance(parsed, int | float):
                return [f"is not a number and has no range: use choices (given: {plain(value)})"]
            if isinstance(parsed, int):
                whole.add(key)
    if not problems and key in whole and axis.step is not None and axis.step % 1:
        problems.append(f"takes integers, and step = {axis.step:g}")
    return problems


def _lines(error: ConfigError) -> list[str]:
    return str(error).split("\n  - ")[1:]


def _activating(axis: Axis, axes: dict[str, Axis]) -> Point:
    """Values of other keys with which a key's conditions hold."""
    values: Point = {}
    for key, allowed in axis.when.items():
        if other := axes.get(key):
            values |= _activating(other, axes)
            values[key] = next(value for value in allowed if other.choices is None or value in other.choices)
    return values


def _population(config: Config, key: str, axis: Axis) -> list[str]:
    """A PBT member continues from another member's weights, so shapes and the optimizer's state must stay the same."""
    if axis.when:
        return ["has a condition, and with search = 'pbt' every member has every key: leave `when` out"]
    real = isinstance(value_of(config, key), float)
    if key in ("optim.learning_rate", "optim.clip_norm") or (key.partition(".")[0] in ("model", "loss") and real):
        return []
    return [
        "cannot change while a member of search = 'pbt' trains: optim.learning_rate, optim.clip_norm and the real-valued "
        "options of [model] and [loss] can; use random or tpe for the others"
    ]


def _grid(space: Space) -> list[str]:
    tune = space.base.tune
    if tune.search != "grid":
        return []
    endless = [key for key in space.axes if space.values(key) is None or space.axes[key].log]
    if endless:
        return [f'tune.space "{key}": a grid needs choices, or low and high with step' for key in endless]
    limit = tune.trials or _MAX_GRID
    if len(list(itertools.islice(space.grid(), limit + 1))) <= limit:
        return []
    key = " (tune.trials)" if tune.trials else ""
    return [f"the grid has more than {limit:,} points{key}: use fewer choices, or search = 'random'"]


def _combinations(space: Space) -> list[str]:
    """Points that the configuration rejects although each of their values is valid; each would be a failed trial."""
    rng, grid = np.random.default_rng(0), space.base.tune.search == "grid"
    drawn = (space.draw(rng) for _ in range(_TRIED_DRAWS))
    points: Iterable[Point] = itertools.islice(space.grid(), _TRIED_GRID) if grid else drawn
    rejected: dict[str, str] = {}  # message -> a point that has it
    tried = bad = 0
    for point in points:
        lines = _rejections(space, point)
        tried, bad = tried + 1, bad + bool(lines)
        for line in lines:
            rejected.setdefault(line, show(point))
    # Random search and TPE draw again when a point is invalid. A grid does not, and a space that is mostly invalid, or
    # whose keys belong to another model, is a mistake.
    if bad and (grid or bad > tried / 2 or any(line.startswith(("unknown key", "reports")) for line in rejected)):
        found = [f"{bad} of {tried} points tried are rejected, e.g. {at}: {line}" for line, at in rejected.items()]
        return found[:5]
    return []


def _rejections(space: Space, point: Point) -> list[str]:
    try:
        metric, expected = space.config(point).training.metric, space.base.training.metric
    except ConfigError as error:
        return _lines(error)
    return [] if metric == expected else [f"reports {metric}, and the sweep compares {expected}"]
