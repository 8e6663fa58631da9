"""Plug-ins by name: a model or a source is one module, its file name is its config name.

A plug-in outside the package is named by its import path ('my_package.my_model').
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
import re
from types import ModuleType
from typing import Literal

from recray.errors import ConfigError

Kind = Literal["model", "source"]

_HOMES: dict[Kind, str] = {"model": "recray.models", "source": "recray.data.sources"}
# What makes a module a plug-in; a module in the same folder without it is a part.
_MARKS: dict[Kind, str] = {"model": "build", "source": "read"}


def names(kind: Kind) -> list[str]:
    """Names of the plug-ins that recray ships, sorted. Does not import them."""
    home = importlib.util.find_spec(_HOMES[kind])
    assert home is not None and home.submodule_search_locations is not None
    found = []
    for module in pkgutil.iter_modules(home.submodule_search_locations):
        spec = importlib.util.find_spec(f"{_HOMES[kind]}.{module.name}")
        source = spec.loader.get_source(spec.name) if spec and spec.loader else ""  # type: ignore[attr-defined]
        if re.search(rf"^(def )?{_MARKS[kind]}\b", source or "", re.MULTILINE):
            found.append(module.name)
    return sorted(found)


def load(kind: Kind, name: str) -> ModuleType:
    """The plug-in module called `name`.

    Raises ConfigError that lists what there is when the name is unknown.
    """
    if "." in name:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"{kind} '{name}' cannot be imported: {error}") from error
        if not hasattr(module, _MARKS[kind]):
            raise ConfigError(f"{kind} module '{name}' has no function '{_MARKS[kind]}'")
        return module
    known = names(kind)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ConfigError(
            f"unknown {kind} '{name}'{hint} Known: {', '.join(known)}; or an import path 'package.module'"
        )
    return importlib.import_module(f"{_HOMES[kind]}.{name}")
