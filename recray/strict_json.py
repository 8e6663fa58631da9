"""JSON as the standard has it: a number that is not finite is null. Python's own NaN and Infinity break other readers."""

from __future__ import annotations

import json
import math
from typing import Any

_DEPTH = 64  # of nested lists and objects; recray's own files have less than ten


def dumps(value: Any, indent: int | None = None, sort_keys: bool = False) -> str:
    """What JSON does not know (dates, paths) becomes text."""
    return json.dumps(_finite(value), indent=indent, default=str, allow_nan=False, sort_keys=sort_keys)


def loads(data: bytes) -> Any:
    """Raises ValueError for what is not JSON in UTF-8, for NaN and Infinity, repeated keys, and more than 64 levels."""
    try:
        value = json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("too many levels") from None
    if not _shallow(value, _DEPTH):
        raise ValueError(f"more than {_DEPTH} levels")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands twice in an object")
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _shallow(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_shallow(one, levels - 1) for one in inner if isinstance(one, dict | list))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value
