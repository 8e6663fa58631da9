"""Which columns are features, of which kind; all checked against their Arrow types before an event is read.

A date or time is a number (microseconds since 1970, standardised as others are) unless it is declared categorical. A list
of floats is a vector and no list of categories: it is left out, and refused where it is declared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from recray import log
from recray.config import DataConfig, FeatureConfig
from recray.data.sources import base
from recray.data.sources.base import Source
from recray.errors import DataError
from recray.records import Role, feature_column

Kinds = dict[str, FeatureConfig]

_MAX_INFERRED = 10_000  # distinct values up to which a column of strings or integers is taken for a category
_SHOWN = 10  # problems in one message
_TAKES = {
    "categorical": "strings, integers, other numbers, booleans, dates or times",
    "numeric": "numbers, booleans, dates or times",
    "list": "lists of strings or integers",
}


def standard_type(kind: pa.DataType) -> pa.DataType | None:
    """The type in which a feature is encoded; None for a type that no feature has."""
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_timestamp(plain) or pa.types.is_date(plain):
        return pa.timestamp("us")
    return base.standard_type(kind)


def guess(kind: pa.DataType) -> FeatureConfig | str:
    """The kind of a column whose kind is not declared, or why it is no feature."""
    standard = standard_type(kind)
    if standard is None:
        return f"{kind} is no type of a feature"
    if pa.types.is_null(standard):
        return "it holds nulls only"
    if pa.types.is_list(standard):
        vector = pa.types.is_floating(standard.value_type)
        return f"{kind} is a vector, not a list of categories" if vector else FeatureConfig(kind="list")
    number = pa.types.is_floating(standard) or pa.types.is_timestamp(standard)
    return FeatureConfig(kind="numeric" if number else "categorical")


def misfit(kind: pa.DataType, config: FeatureConfig) -> str | None:
    """Why a column of this type cannot have the declared kind; None if it can."""
    standard = standard_type(kind)
    if standard is not None and pa.types.is_null(standard):
        return None
    guessed = guess(kind)
    listed = standard is not None and pa.types.is_list(standard)
    if isinstance(guessed, str) or listed != (config.kind == "list"):
        fits = False
    else:
        fits = config.kind != "numeric" or not pa.types.is_string(standard)
    if fits:
        return None
    instead = f" or declare kind '{guessed.kind}'" if isinstance(guessed, FeatureConfig) else " or leave it out"
    return f"kind '{config.kind}' takes {_TAKES[config.kind]}, and the column is {kind}: convert it,{instead}"


@dataclass(frozen=True)
class FeatureColumns:
    """The features by role, and the side tables with their key and these features in standard types."""

    context: Kinds
    user: Kinds
    item: Kinds
    users: pa.Table | None
    items: pa.Table | None


def choose(config: DataConfig, source: Source, types: Mapping[str, pa.DataType]) -> FeatureColumns:
    """The features of a log. types: of the columns of its events. Raises DataError that lists everything that does not fit."""
    problems: list[str] = []
    context = _context(config, types, problems)
    for role, table in (("user", source.users), ("item", source.items)):
        if table is not None and table[role].type != types[role]:
            problems.append(
                f"{role} ids are {types[role]} in the log but {table[role].type} in data.{role}s: "
                f"make data.columns.{role} the same type in both files"
            )
    user, users = _side("user", source.users, config.user_features, problems)
    item, items = _side("item", source.items, config.item_features, problems)
    if len(problems) == 1:
        raise DataError(problems[0])
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        listed = "".join(f"\n  - {problem}" for problem in [*problems[:_SHOWN], *more])
        raise DataError(f"{len(problems)} columns cannot be used as configured:{listed}")
    return FeatureColumns(context, user, item, users, items)


def _context(config: DataConfig, types: Mapping[str, pa.DataType], problems: list[str]) -> Kinds:
    """Kinds of the context features; what does not fit is added to `problems`."""
    found: Kinds = {}
    skipped = []
    problems += [
        f"context feature {name!r} is not read from the log: name it in data.columns.context "
        f"({config.columns.context}){base.did_you_mean(name, config.columns.context)}"
        for name in config.context_features
        if name not in config.columns.context
    ]
    for name in config.columns.context:
        column = feature_column("context", name)
        if column not in types:
            problems.append(f"data.columns.context names {name!r}, but the source gives no column {column!r}")
            continue
        declared = config.context_features.get(name)
        kind = declared or guess(types[column])
        if pa.types.is_null(types[column]) and not declared:
            kind = FeatureConfig(kind="categorical")  # another day's log may have values
        if isinstance(kind, str):
            skipped.append(f"{name!r} ({kind})")
            continue
        if problem := misfit(types[column], kind):
            problems.append(f"data.context_features.{name}: {problem}")
        found[name] = kind
    _tell("context", skipped)
    return found


def _side(role: Role, table: pa.Table | None, declared: Kinds, problems: list[str]) -> tuple[Kinds, pa.Table | None]:
    """Kinds of a side table's features, and the table with its key and these features in standard types.

    Without declared features every usable column is one. Other columns are not converted.
    """
    if table is None:
        if declared:
            problems.append(f"data.{role}_features names {next(iter(declared))!r}, but there is no data.{role}s table")
        return {}, None
    prefix = feature_column(role, "")
    columns = {name.removeprefix(prefix): table[name] for name in table.column_names if name.startswith(prefix)}
    wrong = [name for name in table.column_names if not name.startswith(prefix) and name != role]
    if wrong:
        raise DataError(
            f"the source's {role} table has a column {wrong[0]!r}: call it {feature_column(role, wrong[0])!r}"
        )
    found: Kinds = {}
    used: dict[str, pa.ChunkedArray] = {role: table[role]}
    if declared:
        for name, config in declared.items():
            problem = _missing(role, name, columns) if name not in columns else misfit(columns[name].type, config)
            converted = None if problem else _standardised(columns[name], f"the {role} table's column {name!r}")
            if isinstance(converted, pa.ChunkedArray):
                found[name], used[feature_column(role, name)] = config, converted
            else:
                problems.append(f"data.{role}_features.{name}: {problem or converted}")
        return found, pa.table(used)
    skipped = []
    for name, column in columns.items():
        kind, converted = _usable(column, f"the {role} table's column {name!r}")
        if isinstance(kind, FeatureConfig):
            found[name], used[feature_column(role, name)] = kind, converted
        else:
            skipped.append(f"{name!r} ({kind})")
    _tell(role, skipped)
    return found, pa.table(used)


def _usable(column: pa.ChunkedArray, where: str) -> tuple[FeatureConfig | str, pa.ChunkedArray | None]:
    """The kind of a column that is not declared and its values, or why it is left out."""
    kind = guess(column.type)
    if isinstance(kind, str):
        return kind, None
    values = _standardised(column, where)
    if isinstance(values, str):
        return f"{column.type}, {values}", None
    if kind.kind == "categorical":
        distinct = len(pc.unique(values.drop_null()))
        if distinct > min(_MAX_INFERRED, max(2, len(values) // 2)):
            return f"{distinct:,} distinct values in {len(values):,} rows", None
    return kind, values


def _standardised(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray | str:
    """The column in its standard type, or why its values do not fit."""
    kind = standard_type(column.type)
    assert kind is not None
    try:
        return base.standardised(column, kind, where)
    except DataError as error:
        return str(error)


def _missing(role: Role, name: str, columns: Mapping[str, object]) -> str:
    return f"the {role} table has no column {name!r}{base.did_you_mean(name, columns)}; columns there: {', '.join(columns)}"


def _tell(role: Role, skipped: list[str]) -> None:
    if skipped:
        log.info(
            "prepare",
            f"left out of the {role} features: {', '.join(skipped)}; declare those that can be used in data.{role}_features",
        )
