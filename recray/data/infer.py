"""`recray init`: a commented configuration guessed from the schema and some rows of Parquet files."""

from __future__ import annotations

import json
import re

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recray import storage
from recray.data.sources import base, files
from recray.errors import DataError

_SAMPLE_ROWS = 50_000
# Names of roles, the likeliest first; a name is split at '_' and at capitals before it is matched.
_NAMES = {
    "user": [
        "user id",
        "userid",
        "user",
        "customer id",
        "customer",
        "visitor id",
        "visitorid",
        "member id",
        "uid",
        "session id",
    ],
    "item": [
        *[
            "item id",
            "itemid",
            "item",
            "product id",
            "productid",
            "product",
            "article id",
            "movie id",
            "movieid",
            "track id",
        ],
        *["video id", "content id", "sku", "asin", "iid", "business id", "book id", "song id", "ad id", "news id"],
    ],
    "timestamp": [
        "timestamp",
        "event time",
        "time",
        "ts",
        "datetime",
        "date",
        "created at",
        "event timestamp",
        "unixtime",
    ],
    "label": ["label", "click", "clicked", "is click", "target"],
    "weight": ["weight", "sample weight"],
    "split": ["split", "fold", "subset"],
}
_CATEGORY_SHARE = 0.2  # an integer or string with fewer distinct values than this share of rows is a category


def infer(uri: str, items: str | None = None, users: str | None = None) -> str:
    """A TOML configuration for the events at `uri` and optional tables of item and user features."""
    sample = _sample(uri)
    roles = _roles(sample)
    unit, note = _unit(sample, roles.get("timestamp"))
    taken = set(roles.values())
    context = {n: kind for n in sample.column_names if n not in taken for kind in [_kind(sample[n])] if kind}
    lines = [
        f"# Inferred from {uri} ({sample.num_rows:,} rows looked at). Check the roles, then: recray run my.toml",
        "",
        "[run]",
        'name = "my-run"',
        'output = "runs"          # folder or URI (local, s3://, gs://)',
        "seed = 1",
        "",
        "[data]",
        'source = "parquet"',
        f"path = {_text(uri)}",
    ]
    lines += [f"{key} = {_text(value)}" for key, value in (("items", items), ("users", users)) if value]
    if unit:
        lines.append(f"timestamp_unit = {_text(unit)}   # {note}")
    lines += ["", "[data.columns]           # which column plays which role"]
    for role, name in roles.items():
        lines.append(
            f"{role} = {_text(name)}   # {sample[name].type}, {len(pc.unique(sample[name])):,} distinct in the sample"
        )
    if "timestamp" not in roles:
        lines.append("# timestamp = ...        # none found: file order is the order")
    lines.append("# Columns known at request time. Others that could be used are commented out.")
    lines.append("context = []" + (f"             # candidates: {', '.join(context)}" if context else ""))
    lines += _split(roles, unit)
    for name, kind in context.items():
        lines += [f"# [data.context_features.{_key(name)}]", f'# kind = "{kind}"']
    for role, table_uri in (("item", items), ("user", users)):
        if table_uri:
            lines += _features(role, table_uri, roles[role])
    lines += [
        "",
        "[model]",
        'name = "two_tower"       # or "sasrec"',
        "dim = 64",
        "history_length = 50",
        "",
        "[training]",
        "epochs = 10",
        "global_batch_size = 1024",
        "",
        "[scaling]",
        "num_workers = 1          # a single one without a cluster is this process",
        "use_gpu = false",
    ]
    return "\n".join(lines) + "\n"


def _sample(uri: str) -> pa.Table:
    """The first rows of the first file that has any, in standard types where there is one."""
    for info in files.find(uri, "init"):
        storage.read_schema(info.uri)  # reports a broken file by its name
        system, path = storage.resolve(info.uri)
        with system.open_input_file(path) as stream:
            batch = next(pq.ParquetFile(stream).iter_batches(batch_size=_SAMPLE_ROWS), None)
        if batch is not None and batch.num_rows:
            table = pa.Table.from_batches([batch])
            plain = {name: base.decoded(table[name]) for name in table.column_names}
            return pa.table(plain)
    raise DataError(f"the Parquet files of {uri} hold no rows; check the path")


def _words(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[_\-.\s]+", " ", name).strip().lower()


def _roles(sample: pa.Table) -> dict[str, str]:
    """Role -> column, by name and type. Raises DataError when no user or item column is found."""
    found: dict[str, str] = {}
    for role, names in _NAMES.items():
        best: tuple[int, int, str] | None = None
        for column in sample.column_names:
            if column in found.values() or not _suits(role, sample[column].type):
                continue
            words = _words(column)
            for rank, name in enumerate(names):
                # The whole name first, then a name that ends with it: click_article_id is an article id.
                loose = role in ("item", "timestamp", "user") and words.endswith(f" {name}")
                if words == name or loose:
                    best = min(x for x in (best, (int(words != name), rank, column)) if x is not None)
        if best is not None:
            found[role] = best[2]
    for role in ("user", "item"):
        if role not in found:
            there = ", ".join(f"{field.name} ({field.type})" for field in sample.schema)
            raise DataError(
                f"no column looks like the {role} id; columns there: {there}; write data.columns.{role} by hand"
            )
    return found


def _suits(role: str, kind: pa.DataType) -> bool:
    standard = base.standard_type(kind)
    number = standard in (pa.int64(), pa.float64())
    if role in ("user", "item"):
        return standard in (pa.int64(), pa.string())
    if role == "timestamp":
        return number or pa.types.is_timestamp(kind) or pa.types.is_date(kind)
    return standard == pa.string() if role == "split" else number


def _unit(sample: pa.Table, name: str | None) -> tuple[str | None, str]:
    """The unit of the timestamps and where it comes from."""
    if name is None:
        return None, ""
    try:
        unit = base.infer_unit(sample[name], name)
    except DataError:
        return "order", f"{name} is no time in s, ms, us or ns: taken for a position"
    if pa.types.is_temporal(sample[name].type):
        return "auto", f"{name} is {sample[name].type}"
    return unit, f"{name} has values like {sample[name][0].as_py()}"


def _kind(column: pa.ChunkedArray) -> str | None:
    """Kind of feature; None for identifiers, times and constants."""
    kind = base.standard_type(column.type)
    if kind is None or kind == pa.null():
        return None
    if pa.types.is_list(kind):
        return "list"
    distinct = len(pc.unique(column))
    if kind == pa.float64():
        return "numeric" if distinct > 1 else None
    return "categorical" if 1 < distinct <= max(20, _CATEGORY_SHARE * len(column)) else None


def _split(roles: dict[str, str], unit: str | None) -> list[str]:
    if "split" in roles:
        return ["", "[data.split]", 'kind = "given"           # data.columns.split names each row\'s split']
    if unit in (None, "order"):
        return ["", "[data.split]", 'kind = "leave_last"      # no times: each user\'s last event is the test']
    return [
        "",
        "[data.split]",
        'kind = "temporal"        # train < valid < test in time',
        'valid = 0.1              # fraction of events, or a duration such as "7d"',
        "test = 0.1",
        "",
    ]


def _features(role: str, uri: str, key: str) -> list[str]:
    sample = _sample(uri)
    if key not in sample.column_names:
        raise DataError(f"{uri} has no column '{key}' to join on; columns there: {', '.join(sample.column_names)}")
    lines = ["", f"# Features of {role}s. Without any of these tables, every usable column is taken."]
    for name in sample.column_names:
        kind = _kind(sample[name]) if name != key else None
        if kind:
            lines += [f"[data.{role}_features.{_key(name)}]", f'kind = "{kind}"']
    return lines


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _text(name)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
