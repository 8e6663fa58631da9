"""Defaults < TOML file < `--set section.key=value`, validated together.

All problems are reported at once, each with its dotted key; for an unknown key the nearest known one is suggested.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from recray import credentials, registry, storage
from recray.config.data import DataConfig
from recray.config.losses import DEFAULT
from recray.config.schema import Config
from recray.errors import ConfigError, RecrayError
from recray.registry import Kind

# Keys of earlier versions, and what replaced them.
_RENAMED = {
    "retrieval.filter_weight": "retrieval.item_knn_weight",
    "evaluation.recent_window": "evaluation.baseline_options.recent_popularity.window",
}


def load_config(path: str | None = None, overrides: Sequence[str] = ()) -> Config:
    """The typed configuration of a TOML file, with overrides.

    path: local path or any URI; None for the defaults alone.
    overrides: 'section.key=value', which win over the file. The key's declared type decides how the text is read.

    Raises ConfigError that lists every problem, StorageError if the file cannot be read.
    """
    table: dict[str, Any] = {}
    if path is not None:
        try:
            table = tomllib.loads(storage.read_bytes(path).decode())
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets in brackets
            raise ConfigError(f"{path} is not valid TOML: {error}") from error
        run = table.setdefault("run", {})
        folder = None if "://" in path else Path(path).absolute().parent
        if isinstance(run, dict) and folder is not None and any(folder.glob("*.py")):
            run.setdefault("plugins", str(folder))
    return parse_config(table, overrides, where=path or "the overrides")


def parse_config(table: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "the configuration") -> Config:
    """As `load_config`, from nested dictionaries as tomllib reads them; `where` names them in errors."""
    try:
        return _parse(table, overrides, where)
    except RecursionError:
        raise ConfigError(f"{where} nests tables too deeply: no key has more than four parts") from None


def _parse(table: Mapping[str, Any], overrides: Sequence[str], where: str) -> Config:
    merged: dict[str, Any] = _copy(table)
    for override in overrides:
        credentials.refuse(override, "--set")
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
    """`config` with other values for some dotted keys, validated as if they were in its file. Raises ConfigError."""
    table = config.model_dump(mode="json", exclude_unset=True)
    for key, value in values.items():
        _assign(table, key, value)
    return parse_config(table, where=where)


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _value(text: str) -> Any:
    """An override's text as TOML where it is TOML, else as a string: the field's declared type decides the rest."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
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
        if location[:2] == ["data", "options"]:
            location[1] = _chosen("source", table).rpartition(".")[2]
        dotted = ".".join(location)
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown key '{dotted}'{_hint(location, table)}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = problem.get("input")
            shown = "" if isinstance(given, dict | BaseModel) else f" (given: {given!r})"
            lines.append(f"{dotted + ': ' if dotted else ''}{message}{shown}")
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return f"{count} in {where}:\n" + "\n".join(f"  - {line}" for line in lines)


def _hint(location: list[str], table: dict[str, Any]) -> str:
    """What an unknown key should be: its new name, the nearest key, the plug-in that has it; and all known keys."""
    *sections, key = location
    section = ".".join(sections)
    known = _keys(sections, table)
    rest = f" Known in {section or 'the top level'}: {', '.join(known)}"
    if ".".join(location) in _RENAMED:
        return f"; it is now called '{_RENAMED['.'.join(location)]}'." + rest
    if near := difflib.get_close_matches(key, known, n=1):
        return f"; did you mean '{'.'.join([*sections, near[0]])}'?" + rest
    if section == "data" and key in registry.names("source"):
        return f": it belongs to data.source = '{key}', and data.source is '{_chosen('source', table)}'." + rest
    if section in ("model", "loss"):
        kind: Kind = "model" if section == "model" else "loss"
        owners = [name for name in registry.names(kind) if key in registry.options(kind, name).model_fields]
        if owners:
            return f": {section}.name = '{_chosen(kind, table)}' has no such key, {', '.join(owners)} has." + rest
    return "." + rest


def _chosen(kind: Kind, table: dict[str, Any]) -> str:
    """The name of the model, loss or source that a table asks for."""
    section, key = ("data", "source") if kind == "source" else (kind, "name")
    given = table.get(section, {})
    if isinstance(given, dict) and key in given:
        return str(given[key])
    if kind == "loss":
        return DEFAULT[_options("model", table).family]
    return "two_tower" if kind == "model" else "parquet"


def _options(kind: Kind, table: dict[str, Any]) -> Any:
    folder = table.get("run", {}).get("plugins")
    return registry.options(kind, _chosen(kind, table), folder)


def _keys(sections: list[str], table: dict[str, Any]) -> list[str]:
    """Known keys of a section, found by walking the declared types."""
    section: type[BaseModel] = Config
    for depth, name in enumerate(sections):
        path = sections[: depth + 1]
        if path in (["model"], ["loss"]):
            section = _options("model" if name == "model" else "loss", table)
        elif path == ["data", _chosen("source", table).rpartition(".")[2]]:
            section = _options("source", table)
        elif path[:2] in (["evaluation", "baseline_options"], ["tracking", "options"]) and depth == 2:
            plugin: Kind = "baseline" if path[0] == "evaluation" else "tracker"
            section = registry.options(plugin, name, table.get("run", {}).get("plugins"))
        else:
            field = section.model_fields.get(name)
            found = [field.annotation, *get_args(field.annotation)] if field else []
            inner = [t for t in found if isinstance(t, type) and issubclass(t, BaseModel)]
            # A name inside dict[str, FeatureConfig]: stay at the section that the values have.
            section = inner[0] if inner else section
    return [name for name in section.model_fields if section is not DataConfig or name != "options"]
