"""Plug-ins by name: models, losses, sources, metrics, baselines and trackers.

A plug-in is one Python file that defines typed `Options` and one entry: `build` (model, baseline, tracker), `loss`, `read` (source)
or `metric`. Its name is resolved in this order:

    "two_tower"            shipped: a table of names in recray.config, the module is imported when something is built
    "my_model"             my_model.py in `folder`, which is the folder of the TOML file (run.plugins)
    "my_package.my_model"  any importable module

A configuration with shipped names therefore loads neither torch nor Ray.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from recray.errors import ConfigError

Kind = Literal["model", "loss", "source", "metric", "baseline", "tracker"]


class _Home(NamedTuple):
    modules: str  # package of the shipped plug-ins, one module each
    table: str  # module that lists them: SHIPPED (name -> options) and BASE (what Options must extend)
    entry: str  # what a plug-in defines besides Options


_HOMES: dict[Kind, _Home] = {
    "model": _Home("recray.models", "recray.config.models", "build"),
    "loss": _Home("recray.losses", "recray.config.losses", "loss"),
    "source": _Home("recray.data.sources", "recray.config.sources", "read"),
    "metric": _Home("recray.metrics", "recray.metrics", "metric"),
    "baseline": _Home("recray.retrieval.baselines", "recray.config.baselines", "build"),
    "tracker": _Home("recray.tracking", "recray.config.trackers", "build"),
}

_searched: ContextVar[str | None] = ContextVar("_searched", default=None)
_files: dict[Path, tuple[int, ModuleType]] = {}  # path -> time of change, module


def names(kind: Kind) -> list[str]:
    """Names of the shipped plug-ins, sorted. Does not import them."""
    return sorted(_shipped(kind))


def options(kind: Kind, name: str, folder: str | None = None) -> Any:
    """The class of a plug-in's options. Imports the plug-in only if it is not a shipped one. Raises ConfigError."""
    if not isinstance(name, str):  # of a configuration that is not validated yet
        raise ConfigError(f"the name of a {kind} is text, given is {name!r}")
    shipped = _shipped(kind)
    return shipped[name] if name in shipped else load(kind, name, folder).Options


def load(kind: Kind, name: str, folder: str | None = None) -> ModuleType:
    """The module of the plug-in `name`; `folder` (run.plugins) is searched for <name>.py.

    Raises ConfigError if there is none, if it fails to import, or if a part of it is missing.
    """
    home = _HOMES[kind]
    if name in _shipped(kind):
        return importlib.import_module(f"{home.modules}.{name}")
    module = _outside(kind, name, folder or _searched.get())
    where = f"{kind} '{name}' ({module.__file__})"
    if not hasattr(module, home.entry):
        raise ConfigError(f"{where} does not define '{home.entry}': see recray/{_page(kind)}/README.md")
    if kind != "metric":
        base = importlib.import_module(home.table).BASE
        found = getattr(module, "Options", None)
        if not (isinstance(found, type) and issubclass(found, base)):
            raise ConfigError(f"{where} needs a class 'Options' that extends recray.config.{base.__name__}")
    return module


def file_hash(kind: Kind, name: str, folder: str | None = None) -> str | None:
    """Hash of the file of a plug-in outside the package; None for a shipped one. An edited file is another plug-in."""
    file = None if name in _shipped(kind) else load(kind, name, folder).__file__
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:8] if file else None


@contextlib.contextmanager
def searching(folder: str | None) -> Iterator[None]:
    """Within this block, look-ups without a folder search `folder`: validators of nested tables see no run.plugins."""
    token = _searched.set(folder)
    try:
        yield
    finally:
        _searched.reset(token)


def pickle_by_value() -> None:
    """Makes Ray send the plug-ins that this process loaded from single files along with whatever uses them.

    Such a file has no import path, by which a worker could load it.
    """
    from ray import cloudpickle

    for _, module in _files.values():
        cloudpickle.register_pickle_by_value(module)


def _shipped(kind: Kind) -> dict[str, type[BaseModel]]:
    table: dict[str, type[BaseModel]] = importlib.import_module(_HOMES[kind].table).SHIPPED
    return table


def _page(kind: Kind) -> str:
    return _HOMES[kind].modules.removeprefix("recray.").replace(".", "/").removesuffix("/baselines")


def _outside(kind: Kind, name: str, folder: str | None) -> ModuleType:
    file = Path(folder, f"{name}.py") if folder and name.isidentifier() else None
    try:
        if file is not None and file.is_file():
            return _from_file(file)
        if "." in name or (name.isidentifier() and importlib.util.find_spec(name) is not None):
            return importlib.import_module(name)
    except Exception as error:  # whatever the file of a user raises while it is imported
        raise ConfigError(f"{kind} '{name}' cannot be imported: {type(error).__name__}: {error}") from error
    known = names(kind)
    beside = sorted(path.stem for path in Path(folder).glob("*.py")) if folder else []
    near = difflib.get_close_matches(name, [*known, *beside], n=1)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    looked = f"There is no file {file}" if file else "A plug-in of your own is a file <name>.py next to the TOML"
    raise ConfigError(
        f"unknown {kind} '{name}'{hint} Known: {', '.join(known)}. {looked}, "
        f"or any importable module 'package.module' (recray/{_page(kind)}/README.md)"
    )


def _from_file(path: Path) -> ModuleType:
    """Executes a file under a unique module name, so that 'json.py' or two files 'my_model.py' do not collide."""
    path = path.resolve()
    changed = path.stat().st_mtime_ns
    if path in _files and _files[path][0] == changed:
        return _files[path][1]
    name = f"recray_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic and dataclasses look annotations up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _files[path] = changed, module
    return module
