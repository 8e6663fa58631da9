"""What can be seen to go wrong before the first step: a validation split that cannot tell the metric."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal

import numpy as np

from recray import storage
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.errors import ConfigError, DataError
from recray.ids import FIRST_ITEM
from recray.loading.batch import Jagged
from recray.loading.collate import eval_queries

_QUERIES = 256  # cut at a time
_BOTH_LABELS = ("auc", "normalized_entropy")
_USER_WITH_BOTH = ("gauc", "gauc_impressions")


def check_validation(config: Config, dataset: PreparedDataset) -> None:
    """Raise DataError if training.metric would be undefined, or 0 for every model, on the validation split.

    Reads shards until the first query that can be answered, so usually a part of the first one.
    """
    if config.model.family == "ranker":
        check_labels(config, dataset)
        _check_clicks(config.training.metric, dataset)
    else:
        _check_lists(config, dataset)


def check_labels(config: Config, dataset: PreparedDataset) -> None:
    """Raise ConfigError if a ranker is to be trained on a dataset without labels."""
    if config.model.family == "ranker" and not dataset.record.labelled:
        raise ConfigError(
            f"model.name = '{config.model.name}' is a ranker and needs click labels; {dataset.uri} has none: set "
            f"data.columns.label, or data.negatives to sample items that were not chosen, and run `recray prepare` again"
        )


def _check_lists(config: Config, dataset: PreparedDataset) -> None:
    found = Counter[str]()
    for history, targets in _queries(dataset, config.evaluation.queries):
        why = _why_not(history, targets, config.evaluation.filter_seen)
        if not why:
            return
        found[why] += 1
    listed = ", ".join(f"{number:,} {why}" for why, number in found.most_common()) or "there is none"
    advice = {
        "come from new users": "validate on a shorter period, or with data.split.kind = 'leave_last'",
        "have unknown items only": "lower data.min_item_events, or validate on a shorter period (data.split)",
        "have items only that the user has seen": "set evaluation.filter_seen = false",
    }.get(next((why for why, _ in found.most_common(1)), ""), "check data.split")
    raise DataError(
        f"no query of the validation split can be answered, so {config.training.metric} would be 0 after every epoch and "
        f"select nothing ({listed}): {advice}"
    )


def _queries(dataset: PreparedDataset, kind: Literal["user", "event"]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Items that the user had before, and the targets, of every validation query."""
    for table in dataset.iter_tables("valid"):
        for query in eval_queries(table, _QUERIES, 1, kind):
            seen, targets = query.seen, query.targets
            for row in range(query.batch.num_rows):
                yield _row(seen, row), _row(targets, row)


def _row(lists: Jagged, row: int) -> np.ndarray:
    return lists.values[lists.offsets[row] : lists.offsets[row + 1]].numpy()


def _why_not(history: np.ndarray, targets: np.ndarray, filter_seen: bool) -> str:
    if not len(history):
        return "come from new users"
    known = targets[targets >= FIRST_ITEM]
    if not len(known):
        return "have unknown items only"
    return "have items only that the user has seen" if filter_seen and np.isin(known, history).all() else ""


def _check_clicks(metric: str, dataset: PreparedDataset) -> None:
    counts = Counter[bool]()  # of impressions by their label
    columns = ["label", "num_targets", *(["weight"] if "weight" in dataset.record.columns else [])]
    for shard in dataset.record.shards["valid"]:
        table = storage.read_table(dataset.file_uri(shard.file), columns)
        for row in (row for batch in table.to_batches(_QUERIES) for row in batch.to_pylist()):
            first = len(row["label"]) - row["num_targets"]
            weights = row["weight"][first:] if "weight" in columns else [1.0] * row["num_targets"]
            labels = [label > 0 for label, weight in zip(row["label"][first:], weights, strict=True) if weight > 0]
            counts.update(labels)
            two = len(set(labels)) == 2 if metric in _USER_WITH_BOTH else len(counts) == 2
            if two or (labels and metric not in (*_BOTH_LABELS, *_USER_WITH_BOTH)):
                return
    raise undefined(metric, counts[True], counts[True] + counts[False])


def undefined(metric: str, clicks: int, impressions: int) -> DataError:
    """The error where these impressions do not tell a click metric."""
    who = " and no user with both" if metric in _USER_WITH_BOTH else ""
    other = "" if metric == "log_loss" else "set training.metric = 'log_loss', or "
    return DataError(
        f"{metric} needs clicks and non-clicks, and the validation split has {clicks:,} clicks in {impressions:,} "
        f"impressions{who}: {other}check data.columns.label and data.split"
    )
