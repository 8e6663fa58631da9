"""The events that `recray check` looks at, read whatever is wrong with them, and findings about single values."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray.cluster import cpus
from recray.config import DataConfig
from recray.data.check.findings import Finding
from recray.data.sampling import shown, spread
from recray.data.sources import base, tables
from recray.data.sources.tables import Footer
from recray.errors import DataError

_DAY = 86_400_000_000
_UNITS = ("s", "ms", "us", "ns")


@dataclass(frozen=True)
class Events:
    """Rows of which user, item and time are valid, in the order of the files.

    user, item: int64 places in `users` and `items`. time: microseconds since 1970, or a position without has_time.
    """

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    label: np.ndarray | None
    users: pa.Array
    items: pa.Array
    dates: np.ndarray  # valid times of all rows, also of those without a valid user or item
    has_time: bool
    rows: int  # looked at, valid or not
    total_rows: int  # of the log

    @property
    def complete(self) -> bool:
        return self.rows == self.total_rows


@dataclass
class _Part:
    """One row group: its columns, and what is wrong with it."""

    user: pa.Array
    item: pa.Array
    time: np.ndarray
    valid: np.ndarray  # of the time
    label: np.ndarray | None
    units: Counter[str]
    faults: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)  # (name, role) -> rows, message


def read(config: DataConfig, footers: Sequence[Footer], most: int) -> tuple[Events, list[Finding]]:
    """Columns of user, item, time and label of row groups with about `most` rows, spread over the log."""
    full = [footer for footer in footers if footer.rows]
    groups = [(footer, group) for footer in full for group, rows in enumerate(footer.group_rows) if rows]
    total = sum(footer.rows for footer in full)
    chosen = groups if total <= most else spread(groups, max(1, int(len(groups) * most / total)))
    texts = {role: _is_text(full, getattr(config.columns, role)) for role in ("user", "item")}
    with ThreadPoolExecutor(cpus.available()) as pool:
        parts = list(pool.map(lambda place: _read(config, place[0], place[1], texts), chosen))
    units: Counter[str] = sum((part.units for part in parts), Counter())
    findings = [*_faults(config, parts), *_units(config, parts, chosen, units)]
    user, item = (pa.chunked_array([getattr(part, role) for part in parts]) for role in ("user", "item"))
    coded = [column.unify_dictionaries().combine_chunks() for column in (user, item)]
    codes = [one.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64) for one in coded]
    valid = np.concatenate([part.valid for part in parts]) & (codes[0] >= 0) & (codes[1] >= 0)
    label = [part.label for part in parts if part.label is not None]
    has_time = config.columns.timestamp is not None and config.timestamp_unit != "order"
    events = Events(
        codes[0][valid],
        codes[1][valid],
        np.concatenate([part.time for part in parts])[valid],
        np.concatenate(label)[valid] if len(label) == len(parts) else None,
        coded[0].dictionary,
        coded[1].dictionary,
        np.concatenate([part.time[part.valid] for part in parts]),
        has_time,
        len(valid),
        total,
    )
    if has_time:
        return _without_future(events, findings), findings
    return events, findings


def _is_text(footers: Sequence[Footer], name: str) -> bool:
    """Whether keys are compared as text: any file, or folder, has them as text."""
    kinds = {
        base.standard_type(footer.schema.field(name).type) if name in footer.schema.names else pa.string()
        for footer in footers
    }
    return not kinds <= {pa.int64(), pa.float64(), pa.null()}


def _read(config: DataConfig, footer: Footer, group: int, texts: dict[str, bool]) -> _Part:
    columns = config.columns
    names = [name for name in (columns.user, columns.item, columns.timestamp, columns.label) if name]
    found = tables.read_columns(footer.uri, footer.hive, names, [group])
    faults: dict[tuple[str, str], tuple[int, str]] = {}
    keys = []
    for role, name in (("user", columns.user), ("item", columns.item)):
        keys.append(_keys(found[name], texts[role], f"{footer.uri}: column '{name}'", role, faults))
        if name not in footer.names:  # the finding `missing_columns`
            faults.pop(("null_ids", role), None)
    rows = len(keys[0])
    moments, valid, units = np.arange(rows), np.ones(rows, bool), Counter[str]()
    if columns.timestamp:
        where = f"{footer.uri}: column '{columns.timestamp}'"
        moments, valid, units = _moments(found[columns.timestamp], config, where, faults)
    label = None
    if columns.label:
        try:
            label = base.finite(found[columns.label], "label", f"{footer.uri}: column '{columns.label}'").to_numpy()
        except DataError as error:
            faults["bad_labels", "label"] = rows, str(error)
    return _Part(keys[0], keys[1], moments, valid, label, units, faults)


def _keys(
    column: pa.ChunkedArray, text: bool, where: str, role: str, faults: dict[tuple[str, str], tuple[int, str]]
) -> pa.Array:
    """Dictionary-encoded keys with nulls where there is none."""
    if column.null_count:
        faults["null_ids", role] = column.null_count, f"{where} has {column.null_count:,} null ids"
    kind = pa.string() if text else pa.int64()
    try:
        base.ids(column.drop_null(), where)
        values = base.decoded(column).cast(kind)
    except (DataError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        faults["bad_ids", role] = len(column), str(error)
        values = pa.chunked_array([pa.nulls(len(column), kind)])
    return pa.array(values.combine_chunks()).dictionary_encode()


def _moments(
    column: pa.ChunkedArray, config: DataConfig, where: str, faults: dict[tuple[str, str], tuple[int, str]]
) -> tuple[np.ndarray, np.ndarray, Counter[str]]:
    """(rows,) microseconds or positions, (rows,) bool of those that are valid, and how many values have which unit."""
    name, rows = ("time", len(column))
    try:
        column = base._times(column, where)
    except DataError as error:
        faults["bad_times", name] = rows, str(error)
        return np.zeros(rows, np.int64), np.zeros(rows, bool), Counter()
    if column.null_count:
        faults["null_times", name] = column.null_count, f"{where} has {column.null_count:,} null timestamps"
    typed = base.is_time(column.type)
    if typed:
        column = column.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
    values = pc.fill_null(column, 0).to_numpy().astype(np.float64)
    valid = np.isfinite(values) & column.is_valid().to_numpy()
    values = np.where(valid, values, 0)
    if config.timestamp_unit == "order" and not typed:
        return values.astype(np.int64), valid, Counter()
    out, dated, units = np.zeros(rows, np.int64), np.zeros(rows, bool), Counter[str]()
    for unit in ("us",) if typed else _UNITS:
        years = base._year(values, unit)
        inside = valid & (years >= base.FIRST_YEAR) & (years < base.LAST_YEAR)
        out[inside] = (values[inside] * (1e6 / base._PER_SECOND[unit])).astype(np.int64)
        units[unit] += int(inside.sum())
        dated |= inside
    odd = int((valid & ~dated).sum())
    if odd:
        first = values[valid & ~dated][0]
        faults["impossible_times", name] = odd, f"{where} holds {first:.0f} in {odd:,} of {rows:,} rows"
    return out, dated, +units


_MEANING = {
    "null_ids": ("null ids", "prepare stops", "drop or fill these rows where the log is written"),
    "bad_ids": ("ids that are no integers or strings", "prepare stops", "convert the column"),
    "null_times": ("null times", "prepare stops", "drop or fill these rows where the log is written"),
    "bad_times": ("times that cannot be read", "prepare stops", "write the column as a timestamp type"),
    "bad_labels": (
        "labels that are not 0 or 1",
        "prepare stops",
        "convert the column, or leave out data.columns.label",
    ),
    "impossible_times": (
        f"times outside of {base.FIRST_YEAR} to {base.LAST_YEAR}, often written for 'no time'",
        "prepare stops",
        "drop these rows where the log is written; data.timestamp_unit = 'order' if they are positions",
    ),
}


def _faults(config: DataConfig, parts: Sequence[_Part]) -> Iterator[Finding]:
    """One finding for each kind of bad value of a column."""
    names = {"time": config.columns.timestamp, "label": config.columns.label}
    for fault, role in dict.fromkeys(key for part in parts for key in part.faults):
        hit = [part.faults[fault, role] for part in parts if (fault, role) in part.faults]
        what, cost, fix = _MEANING[fault]
        rows = sum(count for count, _ in hit)
        column = str(names.get(role) or getattr(config.columns, role, role))
        yield Finding(
            "error",
            fault,
            f"column {shown(column)} has {what} in {rows:,} rows looked at: {hit[0][1].partition('; ')[0]}",
            cost,
            fix,
            {"column": column, "rows": rows},
        )


def _units(
    config: DataConfig, parts: Sequence[_Part], places: Sequence[tuple[Footer, int]], units: Counter[str]
) -> Iterator[Finding]:
    """Times of different units: one is read for all files."""
    if len(units) < 2:
        return
    usual = units.most_common(1)[0][0]
    odd = [(footer, part) for (footer, _), part in zip(places, parts, strict=True) if set(part.units) - {usual}]
    there = ", ".join(f"{unit} in {rows:,} rows" for unit, rows in units.most_common())
    yield Finding(
        "error",
        "mixed_time_units",
        f"column {shown(config.columns.timestamp or '')} holds times in {there}; such as {odd[0][0].uri}",
        "prepare takes one unit for all files and stops at the others",
        f"write these files again with times in {usual}",
        {"units": dict(units), "files": len({footer.uri for footer, _ in odd})},
    )


def _without_future(events: Events, findings: list[Finding]) -> Events:
    """Without events of a day after now, which a finding names: they would be the test split."""
    late = events.time > time.time() * 1e6 + _DAY
    if not late.any() or late.all():
        return events
    last = np.datetime64(int(events.time.max()), "us").astype("datetime64[s]")
    findings.append(
        Finding(
            "warning",
            "future_times",
            f"{int(late.sum()):,} events lie in the future, the last one at {last}",
            "a split by time takes its test period from the end of the log",
            "drop these rows, or set data.split.end to the time of the last real event",
            {"rows": int(late.sum())},
        )
    )
    keep = ~late
    label = None if events.label is None else events.label[keep]
    return replace(events, user=events.user[keep], item=events.item[keep], time=events.time[keep], label=label)
