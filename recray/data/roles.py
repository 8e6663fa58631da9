"""Which column plays which role, for `recray init`: by type and values first, by names second."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray.data import names
from recray.data.sampling import Column, Sample, describe, shown
from recray.data.sources import base
from recray.errors import DataError
from recray.ids import SPLITS

_PACKED = r"^\S+-[01]( \S+-[01])*$"  # MIND's impressions: 'N1-0 N2-1'
_DATES = r"^\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([T ,].*)?$"


@dataclass
class Roles:
    """columns: role -> column, "?" where it is open. notes: for people, on stderr. questions: what stops prepare."""

    sample: Sample
    columns: dict[str, str] = field(default_factory=dict)
    candidates: dict[str, list[str]] = field(default_factory=dict)
    unit: str | None = None
    notes: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)

    def taken(self) -> set[str]:
        return set(self.columns.values())

    def free(self) -> list[Column]:
        return [c for c in self.sample.columns.values() if c.name not in self.taken() and not c.unusable]


def find_roles(sample: Sample, given: Mapping[str, str | None]) -> Roles:
    """given: role -> the column that the user names, for any of user, item, timestamp, label, weight.

    Raises DataError if such a column does not exist.
    """
    roles = Roles(sample)
    for role, name in given.items():
        if name is not None:
            roles.columns[role] = _existing(sample, name, role)
    _find_time(roles)
    for role in ("user", "item"):
        _find_id(roles, role)
    _find_label(roles)
    _find_weight(roles)
    _find_split(roles)
    roles.columns = {
        r: roles.columns[r] for r in ("user", "item", "timestamp", "label", "weight", "split") if r in roles.columns
    }
    return roles


def leaks(column: Column) -> bool:
    """Whether the name says that the value is known only after the item was shown or chosen."""
    return column.mentions(names.OUTCOMES) or ("duration" in column.words and not column.mentions(names.NOUNS["item"]))


def names_rows(column: Column) -> bool:
    """Whether it is called like an id of rows: transaction_id."""
    return column.mentions(names.ROW_WORDS) and column.words[-1] in names.ID_WORDS


def _existing(sample: Sample, name: str, role: str) -> str:
    if name in sample.columns:
        return name
    if name in sample.repeated:
        raise DataError(f"{sample.uri}: two columns are called {shown(name)}; rename one of them")
    columns = list(sample.columns)
    same = [other for other in columns if other.lower() == name.lower()]
    near = same or difflib.get_close_matches(name, columns, n=1, cutoff=0.4)
    hint = f"; did you mean {shown(near[0])}?" if near else ""
    raise DataError(
        f"{sample.uri} has no column {shown(name)} for role {role}{hint} Columns there: {describe(columns, 40)}"
    )


# ---- user and item


def _find_id(roles: Roles, role: str) -> None:
    if role in roles.columns:
        _check_id(roles, role)
        return
    named = sorted((rank, c.name) for c in roles.free() for rank in [_noun_rank(c, role)] if rank is not None)
    other = "item" if role == "user" else "user"
    possible = [c for c in roles.free() if _could_be_id(c) and _noun_rank(c, other) is None]
    if named:
        roles.columns[role] = named[0][1]
        _check_id(roles, role)
        return
    ids = [c for c in possible if c.mentions(names.ID_WORDS) and not c.mentions(names.ROW_WORDS)]
    if role == "item" and roles.columns[other] in roles.sample.columns and len(ids) == 1 and not ids[0].all_unique:
        roles.columns[role] = ids[0].name
        roles.notes.append(f"{shown(ids[0].name)} is taken for the item: no other column looks like an id")
        return
    ranked = sorted(possible, key=lambda c: (c.all_unique, c.mentions(names.ROW_WORDS), -c.distinct))
    roles.columns[role] = _open(roles.sample)
    roles.candidates[role] = [c.name for c in ranked]
    roles.questions.append(
        f"which column is the {role}? Candidates: {describe(roles.candidates[role]) or 'none'}. "
        f"Write it to data.columns.{role}, or pass --{role} COLUMN{_packed(roles) if role == 'item' else ''}"
    )


def _open(sample: Sample) -> str:
    """What stands for an open role: no column is called so."""
    mark = "?"
    while mark in sample.columns:
        mark += "?"
    return mark


def _noun_rank(column: Column, role: str) -> tuple[int, ...] | None:
    """Lower is likelier; None for a column that is not called like a user or an item, or cannot be one."""
    if not (column.is_text or column.is_number) or column.is_bool or (column.free_text and role == "user"):
        return None
    parts = [piece for word in column.words for piece in _unglued(word, role)]
    bare = parts[-1:] != [] and parts[-1] not in names.ID_WORDS
    while len(parts) > 1 and parts[-1] in names.ID_WORDS:
        parts.pop()
    called = len(parts) > 1 and parts[-1] in ("name", "title")
    text = "_".join(parts[:-1] if called else parts)
    for rank, noun in enumerate(names.NOUNS[role]):
        exact = text == noun
        if exact or text.endswith(f"_{noun}"):
            late = role == "user" and noun in names.LATE_USERS
            return tuple(
                map(int, (column.nulls > 0, column.all_unique, late, called, not exact, rank, bare, column.partition))
            )
    return None


def _unglued(word: str, role: str) -> list[str]:
    """'visitorid' -> visitor, id."""
    for ending in ("id", "key", "code", "uuid", "name", "hash", "no"):
        if word.endswith(ending) and word.removesuffix(ending) in names.NOUNS[role]:
            return [word.removesuffix(ending), ending]
    return [word]


def _could_be_id(column: Column) -> bool:
    if column.is_bool or column.nulls or column.free_text or column.distinct < 2:
        return False
    return column.is_text or column.is_integer


def _check_id(roles: Roles, role: str) -> None:
    """Ask about what prepare would refuse."""
    column = roles.sample.columns[roles.columns[role]]
    problem = f"it is {column.unusable}" if column.unusable else ""
    if not problem:
        try:
            base.ids(column.values, "it", pa.string() if column.is_text else pa.int64())
        except DataError as error:
            problem = str(error).partition(";")[0]
    if problem:
        roles.questions.append(
            f"{shown(column.name)} looks like the {role}, but {problem}: ids are integers or strings "
            f"without nulls; convert it or drop these rows, or pass --{role} COLUMN"
        )


def _packed(roles: Roles) -> str:
    """A hint where one row holds several items."""
    for column in roles.sample.columns.values():
        items = any(word.rstrip("s") in names.NOUNS["item"] for word in column.words)
        if column.is_list and not column.vector and items:
            return f". {shown(column.name)} holds several items a row: write one row per item"
        if column.is_text and _share(column, _PACKED) > 0.95:
            return f". {shown(column.name)} holds several items with their clicks a row: write one row per item shown, with a label"
    return ""


def _share(column: Column, pattern: str) -> float:
    """Share of the values that match."""
    values = column.values.drop_null()
    return (
        float(pc.mean(pc.match_substring_regex(values, pattern).cast(pa.float64())).as_py() or 0) if len(values) else 0
    )


# ---- time


def _find_time(roles: Roles) -> None:
    """The time: a type of times, integers in the range of epochs, text that reads as a time, or a position by its name."""
    if "timestamp" in roles.columns:
        column = roles.sample.columns[roles.columns["timestamp"]]
        roles.unit = _unit(column) or ("order" if column.is_number else None)
        _check_time(roles, column)
        _check_position(roles, column)
        return
    found = [(kind, c) for c in roles.free() for kind in [_time_kind(c)] if kind is not None]
    if not found:
        return
    finest = max(c.distinct for _, c in found)
    _, best = min(found, key=lambda pair: _time_order(pair[0], pair[1], finest))
    others = [c.name for k, c in found if c is not best and k < 3]
    roles.columns["timestamp"] = best.name
    roles.unit = _unit(best) or ("order" if best.is_number else None)
    if others:
        roles.notes.append(
            f"{shown(best.name)} is taken for the time, not {describe(others)}; --time COLUMN chooses another"
        )
    _check_time(roles, best)
    _check_position(roles, best)


def _check_position(roles: Roles, column: Column) -> None:
    """Say why numbers are taken for positions, or ask about those that are times of several units."""
    if roles.unit != "order":
        return
    units = _units(column)
    if len(units) > 1:
        there = ", ".join(f"{unit} in {share:.0%} of the rows" for unit, share in units.items())
        roles.questions.append(
            f"{shown(column.name)} holds times of several units ({there}); write them in one, "
            f"or set data.timestamp_unit = 'order' if they are positions"
        )
        return
    low, high = column.range
    roles.notes.append(
        f"{shown(column.name)} runs from {low:.0f} to {high:.0f}, which is no time in s, ms, us or ns: "
        f"it is taken for a position (data.timestamp_unit = 'order')"
    )


def _time_kind(column: Column) -> int | None:
    """0 a type of times, 1 an epoch, 2 ISO 8601 text, 3 other text, 4 a position called a time."""
    if column.is_time:
        return 0
    if column.is_bool:
        return None
    if column.is_number and not column.mentions(names.NO_TIMES):
        unit = _unit(column)
        if unit is None:
            return 4 if column.called(names.TIMES) and column.is_integer and column.distinct > 1 else None
        named_id = column.words[-1:] in (("id",), ("ids",), ("uuid",))
        if _time_name(column) < len(names.TIMES) or (not named_id and _share_within(column, unit, 1995, 2040) == 1):
            return 1
    if column.is_text and _share(column, _DATES) > 0.95:
        return 2 if _unit(column) else 3
    return None


def _time_order(kind: int, column: Column, finest: int) -> tuple[float, ...]:
    return (
        column.mentions(names.NO_TIMES),
        column.nulls > 0,
        column.distinct * 2 < finest,
        kind,
        _time_name(column),
    )


def _time_name(column: Column) -> int:
    """Lower is likelier; len(names.TIMES) for a column that is not called like a time."""
    text = "_".join(column.words)
    ends = [i for i, known in enumerate(names.TIMES) if text == known or text.endswith(f"_{known}")]
    return ends[0] if ends else len(names.TIMES)


def _unit(column: Column) -> str | None:
    """The unit of an epoch, "auto" of a type of times or text of times; None for what is neither, apart from a few values."""
    if column.nulls == column.rows or not (column.is_time or column.is_text or column.is_number):
        return None
    try:
        unit = base.infer_unit(column.values, column.name)
    except DataError:
        return None
    if not column.is_number:
        return "auto"
    return unit if _share_within(column, unit, base.FIRST_YEAR, base.LAST_YEAR) > 0.9 else None


def _units(column: Column) -> dict[str, float]:
    """Shares of the rows that are times in each unit, if that explains nearly all of them; else empty."""
    found = {unit: _share_within(column, unit, base.FIRST_YEAR, base.LAST_YEAR) for unit in base._PER_SECOND}
    return {unit: share for unit, share in found.items() if share} if sum(found.values()) > 0.95 else {}


def _share_within(column: Column, unit: str, first: int, last: int) -> float:
    """Share of the values that lie in these years."""
    seconds = column.values.drop_null().to_numpy().astype(float) / base._PER_SECOND[unit]
    year = 1970 + seconds / base._YEAR_SECONDS
    return float(((first <= year) & (year < last)).mean())


def _check_time(roles: Roles, column: Column) -> None:
    """Ask about what prepare would refuse."""
    try:
        base.microseconds(column.values, "us" if roles.unit in (None, "auto") else roles.unit, shown(column.name))
    except DataError as error:
        roles.questions.append(str(error))


# ---- label, weight, split


def _zero_one(column: Column) -> bool:
    """0 and 1 only, both of them, no nulls."""
    return column.is_number and column.nulls == 0 and column.distinct == 2 and column.range == (0.0, 1.0)


def _find_label(roles: Roles) -> None:
    if "label" in roles.columns:
        column = roles.sample.columns[roles.columns["label"]]
        if not _zero_one(column):
            roles.questions.append(f"{shown(column.name)} cannot be the label: {_why_no_label(column)}")
        return
    named = sorted((c for c in roles.free() if c.called(names.LABELS)), key=_label_rank)
    fitting = [c.name for c in named if _zero_one(c)]
    if fitting:
        roles.columns["label"] = fitting[0]
    else:
        roles.notes += [f"{shown(c.name)} is not taken for the label: {_why_no_label(c)}" for c in named if c.is_number]
    for column in roles.free():
        if column.is_number and column.mentions(names.RATINGS):
            low, high = column.range
            roles.notes.append(
                f"{shown(column.name)} holds ratings from {low:g} to {high:g}, which are no click label: every row counts as "
                f"chosen. Keep the rows that count as liked, or write a column of 0 and 1 for a ranker, or use the "
                f"rating as weight (--weight {shown(column.name)})"
            )


def _label_rank(column: Column) -> tuple[int, str]:
    return names.LABELS.index("_".join(column.words)), column.name


def _why_no_label(column: Column) -> str:
    low, high = column.range
    if column.unusable or not column.is_number:
        return f"it is {column.type}; a label is 0 or 1"
    if column.nulls:
        return f"{column.nulls} of {column.rows} sampled rows are null; a label is 0 or 1: fill or drop these rows"
    if column.distinct == 1:
        return f"it is {low:g} in every sampled row, and a label needs both 0 and 1"
    return f"it runs from {low:g} to {high:g}, and a label is 0 or 1: write such a column, e.g. rating >= 4"


def _find_weight(roles: Roles) -> None:
    if "weight" in roles.columns:
        column = roles.sample.columns[roles.columns["weight"]]
        if not _is_weight(column):
            roles.questions.append(
                f"{shown(column.name)} cannot be the weight: weights are finite numbers >= 0 without nulls, not all 0; "
                f"it runs from {column.range[0]:g} to {column.range[1]:g} with {column.nulls} nulls"
            )
        return
    for column in roles.free():
        if column.called(names.WEIGHTS) and column.is_number:
            if _is_weight(column):
                roles.columns["weight"] = column.name
                return
            roles.notes.append(
                f"{shown(column.name)} is not taken for the weight: it holds negative, missing or only zero values"
            )
        elif column.called(names.COUNTS) and _is_weight(column):
            roles.notes.append(
                f"{shown(column.name)} counts something: to weigh events by it, pass --weight {shown(column.name)}"
            )


def _is_weight(column: Column) -> bool:
    if column.unusable or not column.is_number or column.nulls:
        return False
    x = column.values.to_numpy().astype(float)
    return bool(np.isfinite(x).all() and x.min() >= 0 and x.max() > 0)


def _find_split(roles: Roles) -> None:
    for column in roles.free():
        if not column.is_text or column.distinct > 6 or column.distinct < 2:
            continue
        values = set(pc.unique(column.values).to_pylist())
        if column.nulls == 0 and {"train", "test"} <= values <= set(SPLITS):
            roles.columns["split"] = column.name
            return
        if {"train", "test"} <= {str(v).lower() for v in values}:
            roles.notes.append(
                f"{shown(column.name)} looks like a split, but its values are {describe(sorted(map(str, values)))}: "
                f"to use it, rename them to {', '.join(SPLITS)}"
            )


def event_kinds(column: Column) -> list[str]:
    """The kinds of events (view, cart, buy) that a column tells; empty for other columns."""
    if not column.called(names.EVENT_KINDS) or not 2 <= column.distinct <= 12 or column.is_list:
        return []
    return sorted(str(value) for value in pc.unique(column.values.drop_null()).to_pylist())
