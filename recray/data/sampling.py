"""A sample of Parquet files for `recray init`: rows from files and row groups across the whole list, and what each column holds."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray import storage
from recray.data.sources import base, files, tables
from recray.data.sources.tables import Footer
from recray.errors import DataError

_PLACES = 16  # row groups, spread over the files, that rows are read from
_ROWS = 50_000  # read in all
_TEXT_CHARACTERS, _TEXT_WORDS = 200, 4  # values of more characters or words on average are free text
_VECTOR = 8  # lists of numbers that all have this many entries or more are vectors

T = TypeVar("T")


@dataclass(frozen=True)
class Column:
    """What the sample shows of one column. `values` are in a standard type where `unusable` is empty."""

    name: str
    type: pa.DataType  # as the files have it
    values: pa.ChunkedArray
    partition: bool = False  # a folder key=value
    unusable: str = ""  # why no role and no feature can be made of it

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Lower-case words of the name: 'click_articleID' -> click, article, id."""
        return tuple(re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[\W_]+", " ", self.name).lower().split())

    def called(self, known: Collection[str]) -> bool:
        """Whether the whole name is one of these."""
        return "_".join(self.words) in known

    def mentions(self, known: Collection[str]) -> bool:
        """Whether any word of the name is one of these."""
        return any(word in known for word in self.words)

    @property
    def rows(self) -> int:
        return len(self.values)

    @property
    def nulls(self) -> int:
        return int(self.values.null_count)

    @cached_property
    def distinct(self) -> int:
        """Distinct values that are not null; of lists, of their entries."""
        if pa.types.is_null(self.values.type):
            return 0
        values = pc.list_flatten(self.values) if self.is_list else self.values
        return int(pc.count_distinct(values, mode="only_valid").as_py())

    @cached_property
    def range(self) -> tuple[float, float]:
        """Least and greatest finite number; (nan, nan) where there is none."""
        if not self.is_number:
            return np.nan, np.nan
        x = self.values.drop_null().to_numpy().astype(float)
        x = x[np.isfinite(x)]
        return (float(x.min()), float(x.max())) if len(x) else (np.nan, np.nan)

    @property
    def is_bool(self) -> bool:
        return bool(pa.types.is_boolean(self.type))

    @property
    def is_integer(self) -> bool:
        return bool(pa.types.is_integer(self.values.type))

    @property
    def is_number(self) -> bool:
        return self.is_integer or bool(pa.types.is_floating(self.values.type))

    @property
    def is_text(self) -> bool:
        return bool(pa.types.is_string(self.values.type))

    @property
    def is_time(self) -> bool:
        return bool(pa.types.is_timestamp(self.values.type))

    @property
    def is_list(self) -> bool:
        return bool(pa.types.is_list(self.values.type))

    @property
    def all_unique(self) -> bool:
        """Whether no two rows share a value, as in a key. False where there are too few rows to tell."""
        return self.rows >= 50 and self.nulls == 0 and self.distinct == self.rows

    @cached_property
    def free_text(self) -> bool:
        if not self.is_text:
            return False
        length = pc.mean(pc.utf8_length(self.values)).as_py() or 0
        spaces = pc.mean(pc.count_substring(self.values, " ")).as_py() or 0
        return bool(length > _TEXT_CHARACTERS or spaces >= _TEXT_WORDS - 1)

    @cached_property
    def vector(self) -> bool:
        """An embedding: lists of floats, or lists of many numbers of one length."""
        if not self.is_list or pa.types.is_string(self.values.type.value_type):
            return False
        if pa.types.is_floating(self.values.type.value_type):
            return True
        lengths = pc.min_max(pc.list_value_length(self.values))
        least, most = lengths["min"].as_py() or 0, lengths["max"].as_py() or 0
        return bool(least == most and least >= _VECTOR)


@dataclass(frozen=True)
class Sample:
    uri: str
    files: int
    total_rows: int  # of all files
    rows: int  # looked at
    columns: dict[str, Column]
    repeated: list[str]  # names that two columns of a file have

    def example(self, name: str) -> str:
        """A value of a column, as text."""
        values = self.columns[name].values.drop_null()
        return str(values[0].as_py()) if len(values) else "null"


def read_sample(uri: str) -> Sample:
    """Rows of at most _PLACES row groups. Raises DataError or StorageError when there are no rows or a file is broken."""
    return sample_of(uri, tables.read_footers(files.find(uri, "init")))


def sample_of(uri: str, footers: Sequence[Footer]) -> Sample:
    """The same of files whose footers are known; uri: what the user calls them."""
    full = [footer for footer in footers if footer.rows]
    if not full:
        raise DataError(f"the {len(footers)} Parquet files of {uri} hold no rows; check the path")
    groups = [(f, g) for f in spread(full, _PLACES) for g, rows in enumerate(f.group_rows) if rows]
    places = spread(groups, _PLACES)
    read = [_read(footer, group, _ROWS // len(places)) for footer, group in places]
    names = dict.fromkeys(name for footer in full for name in footer.names)
    repeated = [n for n in names if any(footer.schema.names.count(n) > 1 for footer in full)]
    columns = {name: _column(name, read, full) for name in names if name not in repeated}
    rows = sum(rows for _, rows in read)
    return Sample(uri, len(footers), sum(f.rows for f in full), rows, columns, repeated)


def spread(entries: Sequence[T], most: int) -> list[T]:
    """At most `most` entries, evenly spaced, the first and the last among them."""
    if len(entries) <= most:
        return list(entries)
    return [entries[i] for i in np.linspace(0, len(entries) - 1, most).round().astype(int)]


def _read(footer: Footer, group: int, most: int) -> tuple[dict[str, pa.ChunkedArray], int]:
    """The first rows of a row group: columns by name, and how many rows."""
    with storage.open_parquet(footer.uri) as file:
        batches = file.iter_batches(batch_size=max(most, 1), row_groups=[group], use_threads=False)
        table = pa.Table.from_batches([next(batches)])
    names = table.column_names
    found = {name: table.column(i) for i, name in enumerate(names) if names.count(name) == 1}
    for key, value in footer.hive.items():
        found.setdefault(key, pa.chunked_array([pa.array([value] * len(table), pa.string())]))
    return found, len(table)


def _column(name: str, read: list[tuple[dict[str, pa.ChunkedArray], int]], footers: list[Footer]) -> Column:
    """A column over all places in its standard type, nulls where a file lacks it."""
    raw = [f.schema.field(name).type for f in footers if f.schema.names.count(name) == 1]
    kind = next((t for t in raw if not pa.types.is_null(t)), pa.null() if raw else pa.string())
    unusable = Column(name, kind, pa.chunked_array([pa.nulls(sum(rows for _, rows in read))]), not raw)
    try:
        joined = tables.column_type(footers, name)
        if joined is None:
            return replace(unusable, unusable=f"{kind} is no type of a feature")
        parts = [_cast(found[name], joined) if name in found else pa.nulls(rows, joined) for found, rows in read]
    except DataError as error:
        reason = str(error).partition("; ")[0].strip()
        different = " in different files" if len(set(raw)) > 1 else ""
        return replace(unusable, unusable=f"{kind}{different}, {reason}")
    chunks = [chunk for part in parts for chunk in (part.chunks if isinstance(part, pa.ChunkedArray) else [part])]
    values = pa.chunked_array(chunks, joined)
    return Column(name, kind, values, not raw, "no values" if values.null_count == len(values) else "")


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if base.is_time(kind):
        return base.decoded(column).cast(pa.timestamp("us"), safe=False)
    return base.standardised(column, kind, "")


def toml_text(value: str) -> str:
    """A TOML string. JSON escapes what TOML forbids in it, except DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def shown(name: str) -> str:
    """A name for a comment or a message: as it is where that is plain, else quoted."""
    plain = name.isprintable() and name == name.strip() and name and "," not in name
    return name if plain else toml_text(name)


def toml_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else toml_text(name)


def describe(names: Sequence[str], most: int = 12) -> str:
    """Names as one line, not all where they are many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more
