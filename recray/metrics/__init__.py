"""Metrics by name. numpy only.

Two kinds: a `ListMetric` values ranked lists, one value per query ("ndcg@10"); a `ClickMetric` values scored impressions,
one value for all of them ("auc"). A metric of your own is a file <name>.py that defines `metric` (README.md in this folder).
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Literal

from recray import registry
from recray.errors import ConfigError
from recray.metrics.clicks import METRICS as CLICK_METRICS
from recray.metrics.clicks import ClickMetric, Clicks, Sample
from recray.metrics.ranking import METRICS as LIST_METRICS
from recray.metrics.ranking import ListMetric

if TYPE_CHECKING:
    from recray.config import Config

__all__ = [
    "CLICK_METRICS",
    "ClickMetric",
    "Clicks",
    "ListMetric",
    "Metric",
    "Sample",
    "check",
    "click_metrics",
    "find",
    "higher_is_better",
    "list_metrics",
    "parse",
]

Metric = ListMetric | ClickMetric
SHIPPED: dict[str, Metric] = {**LIST_METRICS, **CLICK_METRICS}

_AT_K = re.compile(r"([^@]+)@([1-9][0-9]*)")


def find(name: str, folder: str | None = None) -> Metric:
    """The metric called `name`, without '@K'; `folder`: run.plugins. Raises ConfigError."""
    if name in SHIPPED:
        return SHIPPED[name]
    found = registry.load("metric", name, folder).metric
    if not isinstance(found, Metric):
        raise ConfigError(f"metric '{name}': `metric` must be a ListMetric or a ClickMetric of recray.metrics")
    return found


def parse(metric: str) -> tuple[str, int | None]:
    """'ndcg@10' -> ('ndcg', 10), 'auc' -> ('auc', None). Raises ConfigError for '@' without a whole number from 1."""
    if "@" not in metric:
        return metric, None
    matched = _AT_K.fullmatch(metric)
    if matched is None:
        raise ConfigError(f"write <name>@<K> with a whole number K from 1{_meant(metric) or ', e.g. ndcg@10'}")
    return matched[1], int(matched[2])


def _meant(metric: str) -> str:
    """ "; did you mean 'ndcg@10'?" for ' NDCG@10x'; empty where nothing is near."""
    name, at, rest = metric.partition("@")
    near = difflib.get_close_matches(name.strip().lower(), SHIPPED, n=1)
    digits = re.search(r"[1-9][0-9]*", rest)
    if not near:
        return ""
    k = f"@{digits[0] if digits else 10}" if at and near[0] in LIST_METRICS else ""
    return f"; did you mean '{near[0]}{k}'?"


def higher_is_better(metric: str, folder: str | None = None) -> bool:
    """Whether larger values of a metric ('ndcg@10', 'log_loss') are better. Raises ConfigError."""
    return find(parse(metric)[0], folder).higher_is_better


def check(metric: str, family: Literal["retriever", "ranker"], at_k: bool, folder: str | None = None) -> None:
    """Raises ConfigError if `metric` is no metric of models of this family.

    at_k: a list metric must be given as <name>@<K> (training.metric), or without @K (evaluation.metrics).
    """
    kind, shipped = (ClickMetric, CLICK_METRICS) if family == "ranker" else (ListMetric, LIST_METRICS)
    wants_k = at_k and family == "retriever"
    allowed = ", ".join(f"{name}@K" if wants_k else name for name in shipped)
    name, k = parse(metric)
    if name not in SHIPPED and name.strip().lower() in SHIPPED:
        raise ConfigError(f"unknown metric{_meant(metric)}")
    found = find(name, folder)
    if not isinstance(found, kind) or (k is not None) != wants_k:
        raise ConfigError(f"does not fit a {family}: use one of {allowed}, or a metric of your own")


def list_metrics(config: Config) -> dict[str, ListMetric]:
    """Metrics in a retriever's report by name, without '@K': the shipped ones, then those that the configuration adds."""
    return LIST_METRICS | {name: one for name, one in _added(config).items() if isinstance(one, ListMetric)}


def click_metrics(config: Config) -> dict[str, ClickMetric]:
    """Metrics in a ranker's report by name: the shipped ones, then those that the configuration adds."""
    return CLICK_METRICS | {name: one for name, one in _added(config).items() if isinstance(one, ClickMetric)}


def _added(config: Config) -> dict[str, Metric]:
    names = [*config.evaluation.metrics, parse(config.training.metric)[0]]
    return {name: find(name, config.run.plugins) for name in names if name not in SHIPPED}
