"""Whether a sweep can run, asked before anything starts: every problem at once, each by name."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from recray.config import Axis, Config, with_values
from recray.errors import ConfigError
from recray.metrics import higher_is_better
from recray.tuning.space import Space, plain, show, value_of

_SWEPT = ("model", "loss", "optim", "training")
_WHY_NOT = {
    "data": "the dataset is prepared once for all trials: make a sweep for each",
    "run": "trials share the run's dataset and seed; seeds are what tune.seeds is for",
    "scaling": "all trials hold the same CPUs and GPUs: set it in [scaling] or [tune]",
    "retrieval": "it does not change what is trained",
    "evaluation": "it changes what the metric means, and trials could not be compared",
    "tune": "a sweep does not sweep itself",
    "training.metric": "trials are compared by it",
    "training.validate_every": "trials are compared after every epoch",
    "training.resume": "it does not change what is trained",
    "training.refit": "trials only select; the winner's own run refits where the configuration says so",
}
# Whole combinations that are tried: of a large grid or a range not all can be.
_TRIED = 256


def metric_of(config: Config) -> tuple[str, str]:
    """What is compared, and whether 'max' or 'min' is best."""
    metric = config.tune.metric or config.training.metric
    return metric, config.tune.mode or (
        "max" if metric != "loss" and higher_is_better(metric, config.run.plugins) else "min"
    )


def check(config: Config, resources: list[str]) -> Space:
    """The space of the sweep. Raises ConfigError with every problem, those of `resources` too."""
    tune, wrong = config.tune, [*_metric(config), *resources]
    if not tune.space:
        wrong.append(
            'tune.space is empty: name keys and what they may be, e.g. "optim.learning_rate" = { low = 1e-4, high = 1e-2, log = true }'
        )
    if tune.search == "tpe" and importlib.util.find_spec("optuna") is None:
        wrong.append("tune.search = 'tpe' needs Optuna: pip install 'recray[tune]', or use 'random'")
    if tune.search != "pbt" and tune.scheduler != "none" and tune.grace_epochs >= config.training.epochs > 1:
        wrong.append(
            f"tune.grace_epochs = {tune.grace_epochs} with training.epochs = {config.training.epochs}: no trial could be ended "
            f"early; lower it, or set tune.scheduler = 'none'"
        )
    axes, in_order = _ordered(tune.space)
    wrong += in_order
    whole: set[str] = set()
    for key, axis in axes.items():
        problems = [*_allowed(key), *_range(axis), *_conditions(config, axis)]
        if not problems:
            problems = _values(config, key, axis, axes, whole)
        if not problems and tune.search == "pbt":
            problems = _perturbed(config, key, axis)
        wrong += [f'tune.space "{key}": {problem}' for problem in problems]
    space = Space(config, axes, frozenset(whole))
    if not wrong:
        wrong = [*_grid(space), *_together(space)]
    if wrong:
        count = "1 problem" if len(wrong) == 1 else f"{len(wrong)} problems"
        raise ConfigError(
            f"{count} with this sweep, and nothing was started:\n" + "\n".join(f"  - {one}" for one in wrong)
        )
    return space


def _metric(config: Config) -> list[str]:
    metric = config.tune.metric
    if metric in (None, "loss", config.training.metric):
        return []
    return [
        f"tune.metric = '{metric}' is never reported: an epoch reports {config.training.metric} (training.metric) and loss; "
        f"set training.metric = '{metric}' and leave tune.metric out"
    ]


def _ordered(space: dict[str, Axis]) -> tuple[dict[str, Axis], list[str]]:
    """Keys after those that their conditions ask for."""
    ordered: dict[str, Axis] = {}
    while len(ordered) < len(space):
        ready = [
            k for k, a in space.items() if k not in ordered and not (a.when.keys() & space.keys()) - ordered.keys()
        ]
        if not ready:
            left = [key for key in space if key not in ordered]
            return ordered, [f"tune.space: the conditions of {', '.join(left)} ask for each other"]
        ordered |= {key: space[key] for key in ready}
    return ordered, []


def _allowed(key: str) -> list[str]:
    section = key.partition(".")[0]
    reason = _WHY_NOT.get(key) or _WHY_NOT.get(section)
    if reason:
        return [f"cannot be swept: {reason}. Keys of {', '.join(f'[{name}]' for name in _SWEPT)} can"]
    return []


def _range(axis: Axis) -> list[str]:
    low, high, step = axis.low, axis.high, axis.step
    if axis.choices is not None:
        if (low, high, step) != (None, None, None) or axis.log:
            return ["has choices, so low, high, step and log mean nothing: leave one or the other out"]
        return [] if axis.choices else ["choices are empty: name at least one value"]
    if low is None or high is None:
        return ["needs low and high, or choices"]
    if low >= high:
        return [f"the range is {'empty' if low == high else 'reversed'}: low = {low:g} must be below high = {high:g}"]
    if axis.log and low <= 0:
        return [f"log = true needs low above 0, and it is {low:g}"]
    if step is not None and axis.log:
        return ["step and log do not go together: use choices"]
    if step is not None and not 0 < step <= high - low:
        return [f"step = {step:g} must be above 0 and at most high - low = {high - low:g}"]
    return []


def _conditions(config: Config, axis: Axis) -> list[str]:
    problems = []
    for key, allowed in axis.when.items():
        known = config.tune.space.get(key)
        if known is None:
            try:
                value_of(config, key)
            except AttributeError:
                problems.append(f"its condition names '{key}', which is no key of this configuration or space")
        elif known.choices is not None and not any(value in known.choices for value in allowed):
            problems.append(f"its condition never holds: {key} is one of {known.choices}, never {allowed}")
    return problems


def _values(config: Config, key: str, axis: Axis, axes: dict[str, Axis], whole: set[str]) -> list[str]:
    """Bounds and choices that the section refuses; keys of whole numbers are added to `whole`."""
    problems: list[str] = []
    for value in [axis.low, axis.high] if axis.choices is None else axis.choices:
        try:
            made = value_of(with_values(config, {**_needed(axis, axes), key: value}), key)
        except ConfigError as error:
            lines = str(error).split("\n  - ")[1:]
            if key == "model.name":  # the message tells of another key
                lines = [
                    f"with '{value}': {line}. What the file sets for one model only goes into tune.space too, with "
                    f'when = {{ "model.name" = ... }}'
                    for line in lines
                ]
            problems += [line for line in lines if line not in problems]
            continue
        if axis.choices is None:
            if isinstance(made, bool) or not isinstance(made, int | float):
                return [f"is no number, so it has no range: use choices (given: {plain(value)})"]
            if isinstance(made, int):
                whole.add(key)
    if not problems and key in whole and axis.step is not None and axis.step % 1:
        problems.append(f"takes whole numbers, and step = {axis.step:g}")
    return problems


def _needed(axis: Axis, axes: dict[str, Axis]) -> dict[str, Any]:
    """Values with which a key's conditions hold."""
    needed: dict[str, Any] = {}
    for key, allowed in axis.when.items():
        known = axes.get(key)
        if known is not None:
            needed |= _needed(known, axes)
            fitting = [v for v in allowed if known.choices is None or v in known.choices]
            needed[key] = fitting[0]
    return needed


def _perturbed(config: Config, key: str, axis: Axis) -> list[str]:
    """PBT goes on from another member's weights, so shapes and the optimiser's state must stay what they are."""
    if axis.when:
        return ["has a condition, and with search = 'pbt' every member has every key: leave `when` out"]
    number = isinstance(value_of(config, key), float)
    if key in ("optim.learning_rate", "optim.clip_norm") or (key.partition(".")[0] in ("model", "loss") and number):
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
    limit = tune.trials or 100_000
    points = len(list(itertools.islice(space.grid(), limit + 1)))
    if points > limit:
        return [
            f"the grid has more than {limit:,} points{' (tune.trials)' if tune.trials else ''}: fewer choices, or search = 'random'"
        ]
    return []


def _together(space: Space) -> list[str]:
    """Values that are fine alone and not together; every one a trial that could only fail."""
    rng = np.random.default_rng(0)
    grid = space.base.tune.search == "grid"
    points: Iterable[dict[str, Any]] = (
        itertools.islice(space.grid(), _TRIED) if grid else (space.draw(rng) for _ in range(_TRIED // 4))
    )
    refused: dict[str, str] = {}
    tried = bad = 0
    for point in points:
        tried += 1
        try:
            config = space.config(point)
        except ConfigError as error:
            lines = str(error).split("\n  - ")[1:]
            bad += 1
        else:
            metric = config.training.metric
            wrong = metric != space.base.training.metric
            lines = [f"reports {metric}, and the sweep compares {space.base.training.metric}"] if wrong else []
            bad += wrong
        for line in lines:
            refused.setdefault(line, show(point))
    # Random search and TPE draw again; a grid has its points, and a space that is mostly wrong is a mistake.
    if bad and (grid or bad > tried / 2 or any(line.startswith(("unknown key", "reports")) for line in refused)):
        return [f"{bad} of {tried} points tried are refused, e.g. {where}: {line}" for line, where in refused.items()][
            :5
        ]
    return []
