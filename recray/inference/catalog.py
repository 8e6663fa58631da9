"""Raw values of items, as the item table has them: titles in answers, filters and caps.

    filters = {"category": ["shoes", "socks"], "price": {"min": 10, "max": 50}}    all of them must hold
    caps = {"brand": 2}                                                            at most two items of a brand

Shape legend: N items, B lists, K places.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray import log
from recray.config import Config
from recray.data.sources import files, tables
from recray.errors import DataError, RecrayError
from recray.ids import FIRST_ITEM, PAD
from recray.records import Feature
from recray.report.titles import title_column

Filters = Mapping[str, Any]
Caps = Mapping[str, int]


class Catalog:
    """Columns of the item table; row i is item id i, null where the table has no such item."""

    def __init__(self, table: pa.Table, title: str | None) -> None:
        """title: which column holds titles."""
        self.table, self.title = table, title

    @staticmethod
    def empty(items: int) -> Catalog:
        return Catalog(pa.table({"row": pa.nulls(items)}).select([]), None)

    @staticmethod
    def read(config: Config, features: list[Feature], items: pa.Array) -> Catalog:
        """The declared item features and the titles of items (N,) by id. Without columns if the item table is gone."""
        if config.data.items is None:
            return Catalog.empty(len(items))
        try:
            footers = tables.read_footers(files.find(config.data.items, "load"))
            title = title_column(footers, config.data.columns.item, config.report.title)
            there = {name for footer in footers for name in footer.schema.names}
            wanted = [one.name for one in features if one.role == "item"] + ([title] if title else [])
            names = [name for name in dict.fromkeys(wanted) if name in there]
            if not names:
                return Catalog.empty(len(items))
            return Catalog(tables.by_key(footers, config.data.columns.item, names, items), title)
        except (RecrayError, OSError, pa.ArrowException) as error:
            log.warning("load", f"lists have no titles and no filters, since the item table cannot be read: {error}")
            return Catalog.empty(len(items))

    def titles(self, ids: np.ndarray) -> list[str | None]:
        if self.title is None:
            return [None] * len(ids)
        return [None if one is None else str(one) for one in self.table[self.title].take(pa.array(ids)).to_pylist()]

    def allowed(self, filters: Filters) -> np.ndarray:
        """(N,) whether each item passes all filters. Raises DataError for a column or a value that cannot be compared."""
        keep = np.ones(len(self.table), bool)
        for name, wanted in filters.items():
            column = self._column(name)
            try:
                found = _in_range(column, wanted) if isinstance(wanted, Mapping) else _one_of(column, wanted)
            except (ValueError, TypeError, OverflowError, pa.ArrowNotImplementedError) as error:
                raise DataError(
                    f"filter {name!r}: {wanted!r} cannot be compared with values of type {column.type}"
                ) from error
            keep &= found
        keep[:FIRST_ITEM] = False
        return keep

    def capped(self, caps: Caps, ids_BK: np.ndarray, scores_BK: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The first k of each list of which no value of a column occurs more often than its cap allows. Items without a
        value are not counted."""
        codes = [(most, self._codes(name)) for name, most in caps.items()]
        out_BK, kept_scores = np.full((len(ids_BK), k), PAD, np.int64), np.zeros((len(ids_BK), k), np.float32)
        for row, ids in enumerate(ids_BK):
            counts: dict[tuple[int, int], int] = {}
            kept: list[int] = []
            for place in np.flatnonzero(ids >= FIRST_ITEM).tolist():
                groups = [(number, int(of_N[ids[place]])) for number, (_, of_N) in enumerate(codes)]
                if any(counts.get(one, 0) >= codes[one[0]][0] for one in groups if one[1] >= 0):
                    continue
                kept.append(place)
                for one in groups:
                    counts[one] = counts.get(one, 0) + 1
                if len(kept) == k:
                    break
            out_BK[row, : len(kept)], kept_scores[row, : len(kept)] = ids[kept], scores_BK[row, kept]
        return out_BK, kept_scores

    def _column(self, name: str) -> pa.ChunkedArray:
        if name not in self.table.column_names:
            there = ", ".join(sorted(self.table.column_names)) or "none"
            raise DataError(f"items have no feature {name!r}; they have: {there}")
        return self.table[name]

    def _codes(self, name: str) -> np.ndarray:
        """(N,) a number for each value; -1 where there is none."""
        column = self._column(name)
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            raise DataError(f"caps: {name!r} holds lists: name a feature with one value for each item")
        found = column.combine_chunks()
        found = found if pa.types.is_dictionary(found.type) else found.dictionary_encode()
        return np.asarray(pc.fill_null(found.indices, -1).to_numpy(zero_copy_only=False))


def _one_of(column: pa.ChunkedArray, wanted: Any) -> np.ndarray:
    """Whether each value is one of those that are wanted; of a list, whether any of its values is."""
    if not isinstance(wanted, (list, tuple)):
        raise TypeError("no list")
    flat = column.combine_chunks()
    if not pa.types.is_list(flat.type) and not pa.types.is_large_list(flat.type):
        found = pc.is_in(flat, value_set=_values(wanted, flat.type))
        return np.asarray(pc.fill_null(found, False).to_numpy(zero_copy_only=False))
    inner = pc.is_in(pc.list_flatten(flat), value_set=_values(wanted, flat.type.value_type))
    rows = pc.list_parent_indices(flat).to_numpy()[np.asarray(inner.to_numpy(zero_copy_only=False))]
    out = np.zeros(len(flat), bool)
    out[rows] = True
    return out


def _values(wanted: list[Any] | tuple[Any, ...], kind: pa.DataType) -> pa.Array:
    found = pa.array([one for one in wanted if one is not None])
    if pa.types.is_string(found.type) != (pa.types.is_string(kind) or pa.types.is_large_string(kind)) and len(found):
        raise TypeError("text and numbers")
    return found.cast(kind)


def _in_range(column: pa.ChunkedArray, wanted: Mapping[str, Any]) -> np.ndarray:
    """Whether each number lies between min and max, both included; missing ones do not."""
    if not wanted or set(wanted) - {"min", "max"}:
        raise TypeError("min and max")
    values = pc.cast(column, pa.float64()).combine_chunks().to_numpy(zero_copy_only=False)
    low, high = (float(wanted.get(name, default)) for name, default in (("min", -np.inf), ("max", np.inf)))
    return np.asarray((values >= low) & (values <= high))
