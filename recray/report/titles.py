"""Titles of items, for people who read lists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from recray import log
from recray.config import Config
from recray.data.sources import files, tables
from recray.errors import DataError, RecrayError

_TITLE = re.compile(r"(.*_)?(title|headline|name|label)(_.*)?", re.IGNORECASE)


def of_items(config: Config, examples: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Key -> title of the items of some examples. Empty where the item table has no column of titles, or is gone.

    The column is report.title, else the first one of text that is called title, headline, name or label.
    """
    wanted = {
        key
        for one in examples
        for keys in (one["history"], one["targets"], *one["lists"].values())
        for key in keys
        if key
    }
    if config.data.items is None or not wanted:
        return {}
    try:
        footers = tables.read_footers(files.find(config.data.items, "evaluate"))
        return _read(footers, config.data.columns.item, config.report.title, wanted)
    except (RecrayError, OSError) as error:
        log.warning("evaluate", f"titles of items cannot be read: {error}")
        return {}


def title_column(footers: Iterable[tables.Footer], key: str, column: str | None) -> str | None:
    """`column` if it is given, else the first one of text that is called title, headline, name or label, if there is one."""
    kinds = {field.name: field.type for footer in footers for field in footer.schema}
    if column is not None and column not in kinds:
        raise DataError(f"report.title = '{column}' is no column of the item table; columns there: {', '.join(kinds)}")
    text = [name for name, kind in kinds.items() if pa.types.is_string(kind) or pa.types.is_large_string(kind)]
    return column or next((name for name in text if name != key and _TITLE.fullmatch(name)), None)


def _read(footers: list[tables.Footer], key: str, column: str | None, wanted: set[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    title = title_column(footers, key, column)
    for footer in footers:
        if title is None or not {title, key} <= set(footer.schema.names):
            continue
        columns = tables.read_columns(footer.uri, footer.hive, [key, title])
        keys = pc.cast(columns[key], pa.string())
        here = pc.is_in(keys, value_set=pa.array(sorted(wanted), pa.string()))
        pairs = zip(keys.filter(here).to_pylist(), columns[title].filter(here).to_pylist(), strict=True)
        found |= {item: str(name) for item, name in pairs if name}
    return found
