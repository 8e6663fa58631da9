"""Every key of the configuration with type, default, range and meaning, from the typed sections themselves.

`recray keys` prints it; `python -m recray.config.reference > jobs/configs/KEYS.md` writes it as a page.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from recray.config import baselines, losses, models, sources, trackers
from recray.config.schema import Config
from recray.errors import ConfigError

_NAMES: dict[Any, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true | false",
    datetime: "time",
    Any: "any",
}
_PLUGINS: dict[str, Any] = {
    "model": models,
    "loss": losses,
    "evaluation.baseline_options": baselines,
    "tracking.options": trackers,
}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "length >=", "max_length": "length <="}


@dataclass(frozen=True)
class Key:
    """One line of the reference. section: 'training', 'model.din'; the other texts as they are printed."""

    section: str
    name: str
    type: str
    default: str
    range: str
    meaning: str


def keys(section: str | None = None) -> list[Key]:
    """All keys, or those of a section and of the tables nested in it, or a single key.

    section: 'data', 'data.columns', 'model' (all models), 'model.din', 'training.epochs'. Raises ConfigError.
    """
    found = [key for title, kind, base in _sections(Config, "") for key in _keys(title, kind, base)]
    if section is None:
        return found
    chosen = [
        key for key in found if f"{key.section}.".startswith(f"{section}.") or f"{key.section}.{key.name}" == section
    ]
    if not chosen:
        known = sorted({key.section for key in found})
        near = difflib.get_close_matches(section, [*known, *(f"{key.section}.{key.name}" for key in found)], n=1)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise ConfigError(f"no section or key '{section}'{hint} Sections: {', '.join(known)}")
    return chosen


def markdown() -> str:
    """The reference as a page."""
    lines = [
        "# Configuration keys",
        "",
        "Printed by `recray keys [SECTION]`. Generated from the code: `python -m recray.config.reference > jobs/configs/KEYS.md`.",
        "",
        '`model.din` stands for the keys that `[model]` has in addition if `name = "din"`; the same for losses.',
    ]
    last = ""
    for key in keys():
        if key.section != last:
            last = key.section
            lines += ["", f"## {key.section}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        kind = f"{key.type}, {key.range}" if key.range else key.type
        cells = (f"`{key.name}`", kind, f"`{key.default}`" if key.default else "required", key.meaning)
        lines.append("| " + " | ".join(_escaped(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _escaped(cell: str) -> str:
    cell = cell.replace("|", "\\|")
    return cell if cell.startswith("`") else cell.replace("<", "&lt;")


def _sections(kind: type[BaseModel], title: str) -> Iterator[tuple[str, type[BaseModel], type[BaseModel] | None]]:
    """Title, class and the class whose keys are left out: each section, then those nested in it."""
    if title:
        yield title, kind, None
    for name, field in kind.model_fields.items():
        below = f"{title}.{name}" if title else name
        if below == "data.options":
            yield from ((f"data.{source}", options, None) for source, options in sources.SHIPPED.items())
        elif below in _PLUGINS:
            base = _PLUGINS[below].BASE
            yield from _sections(base, below)
            yield from ((f"{below}.{plugin}", options, base) for plugin, options in _PLUGINS[below].SHIPPED.items())
        elif inner := _inner(field.annotation):
            yield from _sections(inner, f"{below}.<name>" if _is_table(field.annotation) else below)


def _keys(title: str, kind: type[BaseModel], base: type[BaseModel] | None) -> Iterator[Key]:
    for name, field in kind.model_fields.items():
        shown = field.annotation
        inherited = base.model_fields.get(name) if base else None
        if (inherited and (name == "name" or inherited.default == field.default)) or (
            title == "data" and name == "options"
        ):
            continue
        if _inner(shown) and not _is_table(shown) and type(None) not in typing.get_args(shown):
            continue  # a nested table, which is a separate section
        default = "" if field.is_required() else _text(field.get_default(call_default_factory=True))
        yield Key(title, name, _type(shown), default, _range(field), _meaning(kind, name))


def _meaning(kind: type[BaseModel], name: str) -> str:
    """The description of a key, which a subclass that changes only the default inherits."""
    for one in kind.__mro__:
        field = getattr(one, "model_fields", {}).get(name) if issubclass(one, BaseModel) else None
        if field is not None and field.description:
            return str(field.description)
    return ""


def _inner(kind: Any) -> type[BaseModel] | None:
    """The section inside an annotation: Section, Section | None, dict[str, Section]."""
    found = [one for one in (kind, *typing.get_args(kind)) if isinstance(one, type) and issubclass(one, BaseModel)]
    return found[0] if found else None


def _is_table(kind: Any) -> bool:
    return typing.get_origin(kind) is dict


def _type(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type(one) for one in inner if one is not type(None))
    if origin is list:
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return f"table of {_type(inner[1])}s"
    return _NAMES.get(kind, "table")


def _range(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(one, name)}" for one in field.metadata for name, sign in _BOUNDS.items() if hasattr(one, name)
    ]
    return ", ".join(bounds)


def _text(value: Any) -> str:
    """A default as TOML writes it; 'unset' for None, which TOML does not have."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return str(value)


if __name__ == "__main__":
    print(markdown(), end="")
