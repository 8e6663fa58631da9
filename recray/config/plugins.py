"""Tables whose keys depend on a plug-in's name: [model], [loss], [data.<source>], [evaluation.baseline_options.<name>],
[tracking.options.<name>].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from recray import registry
from recray.errors import ConfigError
from recray.registry import Kind


def options_of(kind: Kind, name: str) -> Any:
    """The class of a plug-in's options, for pydantic's validators: ValueError if there is no such plug-in."""
    try:
        return registry.options(kind, name)
    except ConfigError as error:
        raise ValueError(str(error)) from error


def typed(kind: Kind, name: str, table: Any, key: str | None = None) -> Any:
    """`table`, validated as the options of the plug-in `name`; errors name the keys below `key`."""
    within = () if key is None else (key,)
    try:
        options = registry.options(kind, name)
    except ConfigError as error:
        problem = PydanticCustomError("plugin", "{message}", {"message": str(error)})
        unknown = InitErrorDetails(type=problem, loc=(*within, "name"), input=name)
        raise ValidationError.from_exception_data(kind, [unknown]) from error
    try:
        return options.model_validate(dict(table) if isinstance(table, Mapping) else table)
    except ValidationError as error:
        details = [
            InitErrorDetails(type=one["type"], loc=(*within, *one["loc"]), input=one["input"], ctx=one.get("ctx", {}))
            for one in error.errors()
        ]
        raise ValidationError.from_exception_data(error.title, details) from error
