"""What `recray prepare` promises (recray/data/README.md), computed anew with pandas: no code of recray's is called.

`expected` takes the events of a log in the order of its files, and says which rows the shards hold and which statistics the
features have; or why the log has to be refused.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

SPLITS = ("train", "valid", "test")


class Refused(Exception):
    """The log has to be refused; the message must contain one of `words`."""

    def __init__(self, *words: str) -> None:
        self.words = words


@dataclass(frozen=True)
class Bounds:
    """Times that a temporal split was made at: train < valid <= validation < test <= test < end."""

    valid: int
    test: int
    end: int


@dataclass
class Expected:
    counts: dict[str, int]
    items: list[tuple[Any, int]]  # keys in the order of their ids, with their chosen train events
    rows: dict[str, dict[Any, dict[str, list[Any]]]]  # split -> user -> columns of the row
    context: dict[str, Any] = field(default_factory=dict)  # feature -> vocabulary, or (mean, std)
    item: dict[str, Any] = field(default_factory=dict)
    user: dict[str, Any] = field(default_factory=dict)
    # What only validation has, and a refit adds: keys of items, and values of features by role and name.
    new_items: list[Any] = field(default_factory=list)
    new_values: dict[tuple[str, str], list[Any]] = field(default_factory=dict)


def deduplicated(events: pd.DataFrame, options: dict[str, Any], timed: bool) -> pd.DataFrame:
    """Of rows with one (user, item, time) one row stays: the greatest label, of equal ones the greatest weight, then that of
    the earliest split, then the first."""
    if not options["drop_duplicates"]:
        return events
    keys = ["user", "item", *(["time"] if timed else [])]
    strength = {f"_{name}": -events[name] if name in events else 0 for name in ("label", "weight")}
    ranked = events.assign(**strength).sort_values([*strength, "code", "time", "order"], kind="stable")
    return events.loc[ranked.drop_duplicates(keys, keep="first").index]


def ordered(events: pd.DataFrame, options: dict[str, Any], timed: bool) -> tuple[pd.DataFrame, dict[str, int]]:
    """Step 1: what is kept of the log, by user, split and time; and counts of what is not."""
    events = events.assign(code=[SPLITS.index(s) for s in events["split"]] if "split" in events else -1)
    counts = {"events_read": len(events)}
    kept = deduplicated(events, options, timed)
    counts["duplicates_dropped"] = len(events) - len(kept)
    counts["events_kept"] = len(kept)
    return kept.sort_values(["user", "code", "time", "order"], kind="stable").reset_index(drop=True), counts


def frequent_users(events: pd.DataFrame, options: dict[str, Any], counts: dict[str, int]) -> pd.DataFrame:
    """Events of the users with enough train events. Whether a user is kept must not depend on what is to be predicted."""
    counted = events["code"] == 0
    if options["k_core"]:
        counted = in_core(events, counted, options)
    per_user = counted.groupby(events["user"]).transform("sum")
    kept = events[per_user >= options["min_user_events"]]
    counts["events_dropped_min_count"] = len(events) - len(kept)
    counts["users_dropped_min_count"] = events["user"].nunique() - kept["user"].nunique()
    counts["users_kept"] = kept["user"].nunique()
    if kept.empty:
        raise Refused("no events are left")
    return kept.reset_index(drop=True)


def in_core(events: pd.DataFrame, train: pd.Series, options: dict[str, Any]) -> pd.Series:
    """Of the train events those that are left when rare users and rare items are dropped in turn, until none is left to drop."""
    while True:
        of_user = train.groupby(events["user"]).transform("sum") >= options["min_user_events"]
        of_item = (train & of_user).groupby(events["item"]).transform("sum") >= options["min_item_events"]
        left = train & of_user & of_item
        if left.equals(train):
            return train
        train = left


def coded(events: pd.DataFrame, kind: str, bounds: Bounds | None) -> pd.DataFrame:
    """Step 2: the split of every event; 3 is none."""
    if kind == "temporal":
        assert bounds is not None
        edges = [bounds.valid, bounds.test, bounds.end]
        return events.assign(code=[sum(t >= edge for edge in edges) for t in events["time"]])
    if kind == "leave_last":
        size = events.groupby("user")["item"].transform("size")
        from_end = size - 1 - events.groupby("user").cumcount()
        code = np.where(size < 3, 0, np.select([from_end == 0, from_end == 1], [2, 1], 0))
        return events.assign(code=code)
    return events


def expected(
    events: pd.DataFrame,
    options: dict[str, Any],
    *,
    timed: bool,
    bounds: Bounds | None = None,
    item_table: pd.DataFrame | None = None,
    user_table: pd.DataFrame | None = None,
) -> Expected:
    """events: columns user, item, time, order, and label, weight, split, 'context <name>' where the log has them.

    options: drop_duplicates, min_user_events, min_item_events, k_core, min_history, split, context, item_features, user_features;
    the last three by name: kind and min_count. Raises Refused.
    """
    events, counts = ordered(events, options, timed)
    events = frequent_users(coded(events, options["split"], bounds), options, counts)
    events["chosen"] = events["label"] > 0 if "label" in events else True
    train = events[events["code"] == 0]
    shown = train["item"].value_counts()
    chosen = Counter(train.loc[train["chosen"], "item"])
    if options["k_core"]:
        core = set(train.loc[in_core(train, train["code"] == 0, options), "item"])
        known = [key for key in shown.index if key in core]
    else:
        known = [key for key, n in shown.items() if n >= options["min_item_events"]]
    rare = () if known else ("no item has",)  # several causes at once: either may be named
    if any(not ((events["code"] == code) & events["chosen"]).any() for code in range(len(SPLITS))):
        raise Refused("no events fall in", *rare)
    if "weight" in train and not train.loc[train["chosen"], "weight"].any():
        raise Refused("have weight 0", *rare)
    if not known:
        raise Refused("no item has")
    items = sorted(((key, chosen[key]) for key in known), key=lambda pair: (-pair[1], pair[0]))
    counts["items_dropped_min_count"] = len(shown) - len(known)
    out = Expected(counts, items, {})
    out.context = {name: fitted(train[f"context {name}"], how) for name, how in options["context"].items()}
    if item_table is not None:
        aligned = item_table.set_index("key").reindex([key for key, _ in items])
        out.item = {name: fitted(aligned[name], how) for name, how in options["item_features"].items()}
    if user_table is not None:
        out.user = {name: fitted(user_table[name], how) for name, how in options["user_features"].items()}
    _grow(out, events[events["code"] <= 1], options, item_table)
    rare = (events["code"] == 0) & ~events["item"].isin(known)
    counts["train_events_dropped_rare_item"] = int(rare.sum())
    counts["events_after_end"] = int((events["code"] == 3).sum())
    events = events[~rare & (events["code"] < 3)].reset_index(drop=True)
    _rows(out, events, set(known), options)
    for name in SPLITS:
        if not out.rows[name]:
            raise Refused(f"no event of the {name} split", "no events fall in")
    return out


def _grow(out: Expected, events: pd.DataFrame, options: dict[str, Any], item_table: pd.DataFrame | None) -> None:
    """events: of train and validation."""
    known = [key for key, _ in out.items]
    shown, chosen = events["item"].value_counts(), Counter(events.loc[events["chosen"], "item"])
    new = [key for key, n in shown.items() if n >= options["min_item_events"] and key not in known]
    out.new_items = sorted(new, key=lambda key: (-chosen[key], key))
    columns = {("context", name): (events[f"context {name}"], how) for name, how in options["context"].items()}
    if item_table is not None:
        aligned = item_table.set_index("key").reindex(known + out.new_items)
        columns |= {("item", name): (aligned[name], how) for name, how in options["item_features"].items()}
    for (role, name), (values, how) in columns.items():
        if how["kind"] != "numeric":
            before = getattr(out, role)[name]
            out.new_values[role, name] = [value for value in fitted(values, how) if value not in before]


def _rows(out: Expected, events: pd.DataFrame, known: set[Any], options: dict[str, Any]) -> None:
    """Step 4: for each split, the rows of users with targets in it."""
    columns = {name: events[name].tolist() for name in events.columns}
    of_user: dict[Any, list[int]] = {}
    for i, user in enumerate(columns["user"]):
        of_user.setdefault(user, []).append(i)
    codes, chosen, item = columns["code"], columns["chosen"], columns["item"]
    for code, name in enumerate(SPLITS):
        rows: dict[Any, dict[str, list[Any]]] = {}
        hits: list[int] = []
        for user, own in of_user.items():
            before, inside, targets = 0, [], []
            for i in own:
                if codes[i] == code and before >= options["min_history"]:
                    targets.append(i)
                    inside.append(i)
                elif codes[i] <= code and chosen[i]:
                    inside.append(i)
                before += chosen[i]
            if targets:
                rows[user] = {column: [values[i] for i in inside] for column, values in columns.items()}
                rows[user]["item"] = [item[i] if item[i] in known else None for i in inside]
                rows[user]["num_targets"] = [len(targets)]
                hits += targets
        out.rows[name] = rows
        events_here = sum(chosen[i] for i in hits)
        out.counts |= {f"events_{name}": events_here, f"users_{name}": len(rows)}
        if "label" in columns:
            out.counts[f"negatives_{name}"] = len(hits) - events_here
        if code:
            out.counts[f"unknown_targets_{name}"] = sum(chosen[i] and item[i] not in known for i in hits)


# ---- features


def missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def fitted(values: pd.Series[Any], how: dict[str, Any]) -> Any:
    """The vocabulary by falling count, ties by value; or (mean, standard deviation)."""
    if how["kind"] == "numeric":
        numbers = np.array([float(v) for v in values if not missing(v)])
        numbers = numbers[np.isfinite(numbers)]
        mean, std = (numbers.mean(), numbers.std()) if len(numbers) else (0.0, 0.0)
        return float(mean), float(std) if std > 1e-12 else 1.0
    entries = [e for v in values if not missing(v) for e in (v if how["kind"] == "list" else [v]) if not missing(e)]
    counts = Counter(entries)
    kept = [value for value, n in counts.items() if n >= how.get("min_count", 1)]
    return sorted(kept, key=lambda value: (-counts[value], value))


def encoded(value: Any, how: dict[str, Any], fit: Any) -> Any:
    """As the shard holds it: an id, a list of ids, or a float."""
    if how["kind"] == "numeric":
        if missing(value) or not math.isfinite(float(value)):
            return 0.0
        return float(np.clip((float(value) - fit[0]) / fit[1], -10, 10))
    if how["kind"] == "list":
        return [] if missing(value) else [_id(entry, fit) for entry in value if not missing(entry)]
    return _id(value, fit)


def _id(value: Any, vocabulary: list[Any]) -> int:
    return 0 if missing(value) else 2 + vocabulary.index(value) if value in vocabulary else 1
