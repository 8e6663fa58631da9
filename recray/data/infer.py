"""`recray init`: a commented configuration inferred from the schema and a sample of Parquet files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from recray import log
from recray.data.roles import Roles, event_kinds, find_roles, leaks, names_rows
from recray.data.sampling import Column, Sample, describe, read_sample, shown, toml_key, toml_text
from recray.data.sources import base
from recray.errors import DataError

_CATEGORY_SHARE = 0.2  # an integer or text with more distinct values than this share of rows is no category
_REPEATS = 3.0  # events per user from which a sequence model is worth its time
_FEW_ITEMS = 50_000  # up to which the softmax over all items is fast
_TAIL = 0.1  # fraction of events in the validation and in the test split


@dataclass(frozen=True)
class Inferred:
    """toml: the configuration. notes: what a reader should know. questions: what must be answered before it runs."""

    toml: str
    notes: list[str]
    questions: list[str]


def infer(uri: str, items: str | None = None, users: str | None = None) -> str:
    """A TOML configuration for the events at `uri` and optional tables of item and user features.

    Open questions stand in the file as "?" with candidates; they and other notes are logged as warnings.
    """
    found = inferred(uri, items, users)
    for message in (*found.notes, *found.questions):
        log.warning("init", message)
    return found.toml


def inferred(
    uri: str, items: str | None = None, users: str | None = None, roles: Mapping[str, str | None] | None = None
) -> Inferred:
    """roles: columns that the user names, by role. Raises DataError when there are no rows, StorageError for a wrong path."""
    return inferred_from(read_sample(uri), items, users, roles)


def inferred_from(
    sample: Sample, items: str | None = None, users: str | None = None, roles: Mapping[str, str | None] | None = None
) -> Inferred:
    """The same from a sample that has been read."""
    uri = sample.uri
    found = find_roles(sample, roles or {})
    _note_columns(found)
    files = "1 file" if sample.files == 1 else f"{sample.files:,} files"
    lines = [
        f"# Inferred from {shown(uri)}: {sample.rows:,} of {sample.total_rows:,} rows of {files} looked at.",
        "# Check the roles, then: recray run my.toml",
        *(f"# OPEN: {_comment(question)}" for question in found.questions),
        "",
        "[run]",
        'name = "my-run"',
        'output = "runs"          # folder or URI (local, s3://, gs://)',
        "seed = 1",
        "",
        "[data]",
        'source = "parquet"',
        f"path = {toml_text(uri)}",
        *(f"{key} = {toml_text(value)}" for key, value in (("items", items), ("users", users)) if value),
        *_unit(found),
        "",
        *_columns(found),
        *_split(found),
    ]
    for role, table in (("item", items), ("user", users)):
        if table:
            lines += _features(role, table, found)
    lines += _model(found)
    return Inferred("\n".join(lines) + "\n", found.notes, found.questions)


def _comment(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _note_columns(roles: Roles) -> None:
    """What people should know of columns that play no role."""
    outcomes = [c.name for c in roles.free() if leaks(c)]
    if outcomes:
        roles.notes.append(
            f"{describe(outcomes)}: by name known only after an item was shown or chosen; "
            f"as data.columns.context this would leak the answer, so it is not proposed"
        )
    for column in roles.free():
        kinds = event_kinds(column)
        if kinds and "label" not in roles.columns:
            roles.notes.append(
                f"{shown(column.name)} tells kinds of events ({describe(kinds)}), and every row counts as chosen: "
                f"keep the rows of the kinds to predict, or add a column of weights"
            )
    if roles.sample.repeated:
        roles.questions.append(
            f"two columns are called {describe(roles.sample.repeated)}: rename one of them in the files"
        )


def _unit(roles: Roles) -> list[str]:
    if roles.unit is None:
        return []
    name = roles.columns["timestamp"]
    column = roles.sample.columns[name]
    said = f"{shown(name)} is {column.type}" if roles.unit == "auto" else f"values like {roles.sample.example(name)}"
    said = f"a position and no time: {said}" if roles.unit == "order" else said
    return [f"timestamp_unit = {toml_text(roles.unit)}   # {_comment(said)}"]


def _columns(roles: Roles) -> list[str]:
    sample = roles.sample
    lines = ["[data.columns]           # which column plays which role"]
    for role, name in roles.columns.items():
        column = sample.columns.get(name)
        if column is None:
            lines.append(f"{role} = {toml_text(name)}   # candidates: {describe(roles.candidates[role]) or 'none'}")
        else:
            kind = f"folder {shown(name)}=..." if column.partition else column.type
            lines.append(f"{role} = {toml_text(name)}   # {kind}, {column.distinct:,} distinct in the sample")
    if "timestamp" not in roles.columns:
        lines.append("# timestamp = ...        # none found: events are ordered as in the files")
    usable, left = _sorted_out([c for c in sample.columns.values() if c.name not in roles.taken()])
    columns = [sample.columns[name] for name in usable]
    later = [c.name for c in columns if leaks(c) or event_kinds(c)]
    known = [c.name for c in columns if c.name not in later and not names_rows(c) and c.name not in base.STANDARD]
    lines.append("# Context: columns that are known when a recommendation is requested; move names into the list.")
    lines.append("context = []" + (f"             # candidates: {describe(known, 40)}" if known else ""))
    if later:
        lines.append(f"# By name known only afterwards, which leaks the answer: {describe(later, 40)}")
    parts = [name for name, column in sample.columns.items() if column.partition]
    if parts:
        examples = (f"{shown(name)}={shown(sample.example(name))}" for name in parts)
        lines.append(f"# Folders that are columns, too: {', '.join(examples)}")
    lines += [f"# Left out: {_comment(line)}" for line in left]
    return lines


def _sorted_out(columns: list[Column]) -> tuple[dict[str, str], list[str]]:
    """Name -> kind of the columns that can be features, and why the others cannot."""
    kinds: dict[str, str] = {}
    left = []
    for column in columns:
        kind, reason = _kind(column)
        if kind:
            kinds[column.name] = kind
        else:
            left.append(f"{shown(column.name)} ({reason})")
    return kinds, left


def _kind(column: Column) -> tuple[str, str]:
    """Kind of feature, or "" and why the column is none."""
    if column.unusable:
        return "", column.unusable
    if column.is_time:
        return "", "a time"
    if column.is_list:
        return ("", "lists of numbers: a vector") if column.vector else ("list", "")
    if column.distinct < 2:
        return "", "one value"
    if column.free_text:
        return "", "free text"
    if column.is_number and not column.is_integer:
        return "numeric", ""
    if column.distinct <= max(20, _CATEGORY_SHARE * column.rows):
        return "categorical", ""
    return "", "every row has its own value" if column.all_unique else f"{column.distinct:,} distinct values"


def _features(role: str, uri: str, roles: Roles) -> list[str]:
    """The feature tables of a side table; questions where it does not fit the log."""
    table = read_sample(uri)
    key = roles.columns[role]
    here, there = table.columns.get(key), roles.sample.columns.get(key)
    if there is not None and here is None:
        roles.questions.append(
            f"{shown(uri)} has no column {shown(key)} to join on, which the log has for the {role}: rename its key; "
            f"columns there: {describe(list(table.columns), 40)}"
        )
    if here is not None and there is not None and here.values.type != there.values.type:
        roles.questions.append(
            f"{shown(key)} is {there.type} in the log and {here.type} in {shown(uri)}: convert one of them"
        )
    if here is not None and here.distinct + here.nulls < here.rows:
        roles.questions.append(f"{shown(uri)} has several rows for one {shown(key)}: keep one row per {role}")
    kinds, left = _sorted_out([c for c in table.columns.values() if c.name != key])
    lines = ["", f"# Features of {role}s. Without any of these tables, every usable column is taken."]
    lines += [f"# Left out: {_comment(line)}" for line in left]
    for name, kind in kinds.items():
        lines += [f"[data.{role}_features.{toml_key(name)}]", f'kind = "{kind}"']
    return lines


# ---- split


def _split(roles: Roles) -> list[str]:
    if "split" in roles.columns:
        return ["", "[data.split]", 'kind = "given"           # data.columns.split names each row\'s split']
    last = [
        "",
        "[data.split]",
        'kind = "leave_last"      # each user\'s last event is the test, the one before it validation',
    ]
    name = roles.columns.get("timestamp")
    column = roles.sample.columns.get(name) if name else None
    if column is None or (roles.unit == "order" and _per_user(roles, column)):
        return last
    try:
        times = base.microseconds(
            column.values, "us" if roles.unit == "auto" else roles.unit or "us", name or ""
        ).to_numpy()
    except DataError:  # a question already
        times = np.arange(column.rows)
    found = _tail(times, roles.unit != "order")
    if found is None:
        roles.notes.append(
            f"{shown(column.name)} has {column.distinct} distinct values, too few to split by time: "
            f"each user's last event is the test"
        )
        return last
    valid, test = found
    return [
        "",
        "[data.split]",
        'kind = "temporal"        # train < valid < test in time',
        f'valid = {valid:12}     # fraction of events, or a duration such as "7d"',
        f"test = {test}",
    ]


def _per_user(roles: Roles, column: Column) -> bool:
    """Whether positions count within each user's history: no more of them than a user has events."""
    user = roles.sample.columns.get(roles.columns["user"])
    if user is None or user.unusable or not user.rows:
        return False
    most = pc.max(pc.value_counts(user.values).field("counts")).as_py() or 0
    return column.distinct <= 1.2 * most


def _tail(times: np.ndarray, timed: bool) -> tuple[str, str] | None:
    """valid and test: fractions, or durations where ties leave nothing after a fraction; None where nothing can do."""
    values, counts = np.unique(times, return_counts=True)
    share = counts / counts.sum()
    from_end = np.cumsum(share[::-1])  # the events at and after each value, the last value first
    tests = int(np.searchsorted(from_end, _TAIL, side="right"))
    both = int(np.searchsorted(from_end, from_end[tests - 1] + _TAIL, side="right")) if tests else 0
    if tests and both > tests and both < len(values):
        return str(_TAIL), str(_TAIL)
    if len(values) < 3 or not timed:
        return None
    seconds = [int(values[-i] - values[-i - 1]) // 1_000_000 for i in (1, 2)]
    if min(seconds) < 1:
        return None
    test, valid = (toml_text(_duration(n)) for n in seconds)
    return valid, test


def _duration(seconds: int) -> str:
    unit, size = next((u, s) for u, s in (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)) if seconds % s == 0)
    return f"{seconds // size}{unit}"


# ---- model


def _model(roles: Roles) -> list[str]:
    sample = roles.sample
    per_user = _per_value(sample, roles.columns["user"])
    model = []
    if "label" in roles.columns:
        model = [
            'name = "din"             # a ranker: it learns from chosen and not chosen rows.',
            "                         # two_tower and sasrec learn from chosen rows and find items in the whole catalogue",
            "dim = 16",
        ]
        batch = _batch(sample.total_rows, 1024)
    elif "timestamp" in roles.columns and per_user >= _REPEATS:
        model = [
            f'name = "sasrec"          # reads the order of events, about {per_user:.0f} per user; two_tower also reads features',
            "dim = 64",
        ]
        batch = _batch(sample.total_rows / per_user, 256)  # a row is a user's whole list
    else:
        model = ['name = "two_tower"       # or "sasrec", where users have many events in order', "dim = 64"]
        model += [] if "timestamp" in roles.columns else ['history = "others"       # the log has no times']
        batch = _batch(sample.total_rows, 1024)
    lines = ["", "[model]", *model, "history_length = 50"]
    if "sasrec" in model[0] and sample.total_rows / max(_per_value(sample, roles.columns["item"]), 1) < _FEW_ITEMS:
        lines += [
            "",
            "[loss]",
            'name = "softmax"         # over all items; "sampled_softmax" for catalogues of millions',
        ]
    return [
        *lines,
        "",
        "[optim]",
        "learning_rate = 1e-3",
        "warmup_steps = 100",
        "",
        "[training]",
        "epochs = 30              # at most: patience ends the training",
        "patience = 3             # validations without improvement",
        f"global_batch_size = {batch}",
        "",
        "[scaling]",
        "num_workers = 1          # a single one without a cluster is this process",
        "use_gpu = false",
    ]


def _batch(rows: float, most: int) -> int:
    """A power of two that gives an epoch of these training rows about 50 steps, where `most` would give fewer."""
    return int(min(most, max(16, 2 ** int(np.log2(max(rows / 50, 1))))))


def _per_value(sample: Sample, name: str) -> float:
    """Events per distinct value of a column in the whole log, estimated from the sample.

    n draws from U equally likely values show U (1 - exp(-n / U)) distinct ones; solved for U by bisection.
    """
    column = sample.columns.get(name)
    if column is None or not column.distinct:
        return 1.0
    n, seen = column.rows - column.nulls, column.distinct
    if sample.rows == sample.total_rows:
        return n / seen
    low, high = float(seen), float(seen) * max(n, 2)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if middle * -np.expm1(-n / middle) > seen else (middle, high)
    return sample.total_rows / high
