"""Defaults < TOML file < `--set section.key=value`, checked as one.

Every problem is reported at once, each with its dotted key; an unknown key is
answered with the nearest known one.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from recray import registry, storage
from recray.config.schema import Config, ModelOptions
from recray.errors import ConfigError, RecrayError


def load_config(path: str | None = None, overrides: Sequence[str] = ()) -> Config:
    """The typed configuration of a TOML file (local or any URI) and overrides 'section.key=value'.

    Raises ConfigError that lists every problem.
    """
    table: dict[str, Any] = {}
    if path is not None:
        try:
            table = tomllib.loads(storage.read_bytes(path).decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from error
    return parse_config(table, overrides, where=path or "the overrides")


def parse_config(table: dict[str, Any], overrides: Sequence[str] = (), where: str = "the configuration") -> Config:
    """As `load_config`, from a table that is already read."""
    merged = _copy(table)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {override!r}: write it as section.key=value, for example training.epochs=5")
        _assign(merged, key.strip(), _value(text.strip()))
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_explain(error, merged, where)) from error
    except ConfigError:
        raise
    except RecrayError as error:
        raise ConfigError(str(error)) from error


def with_values(config: Config, values: Mapping[str, Any], where: str = "the values") -> Config:
    """`config` with other values of some dotted keys, checked as if they stood in its file. Raises ConfigError."""
    table = config.model_dump(mode="json", exclude_unset=True)
    for key, value in values.items():
        _assign(table, key, value)
    return parse_config(table, where=where)


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, dict) else value


def _value(text: str) -> Any:
    """An override's text as TOML where it is TOML, else as a string: the field's declared type decides the rest."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _assign(table: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {dotted}: '{section}' is a value, not a section")
    table[key] = value


def _explain(error: ValidationError, table: dict[str, Any], where: str) -> str:
    lines = []
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        dotted = ".".join(location)
        if problem["type"] == "extra_forbidden":
            known = _keys(location[:-1], table)
            near = difflib.get_close_matches(location[-1], known, n=1)
            home = ".".join(location[:-1])
            hint = f"; did you mean '{'.'.join([*location[:-1], near[0]])}'?" if near else "."
            lines.append(f"unknown key '{dotted}'{hint} Known in {home or 'the top level'}: {', '.join(known)}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = problem.get("input")
            shown = "" if isinstance(given, dict | BaseModel) else f" (given: {given!r})"
            lines.append(f"{dotted + ': ' if dotted else ''}{message}{shown}")
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return f"{count} in {where}:\n" + "\n".join(f"  - {line}" for line in lines)


def _keys(sections: list[str], table: dict[str, Any]) -> list[str]:
    """Known keys of a section, found by walking the declared types."""
    section: type[BaseModel] = Config
    for name in sections:
        if section is Config and name == "model":
            chosen = str(table.get("model", {}).get("name", "two_tower"))
            section = registry.load("model", chosen).Options
            continue
        field = section.model_fields.get(name)
        options = [field.annotation, *get_args(field.annotation)] if field else []
        inner = [t for t in options if isinstance(t, type) and issubclass(t, BaseModel)]
        if not inner:
            # A name inside dict[str, FeatureConfig]: stay at the section that the values have.
            continue
        section = inner[0]
    return list((section or ModelOptions).model_fields)
