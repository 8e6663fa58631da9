"""Logs made by hypothesis: schemas, types, nulls, names, partitions and layouts of files, with the configuration to prepare them.

A `MadeLog` is drawn small (what there is) and filled by a seeded generator, so that a failure shrinks to few choices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

START = 18_518 * 86_400  # a midnight of 2020
DAY = 86_400
ODD_NAMES = ["price.usd", "a b", "名前", "a\nb", 'q"uote', "UPPER", "user.id", "x" * 80, "é"]
TAKEN_NAMES = ["count", "code", "bucket", "item", "user", "time", "order", "weight", "split", "type", "items", "keys"]
KEYS: dict[str, Callable[[int], Any]] = {
    "int": lambda i: i,
    "negative": lambda i: -(2**40) - i,
    "text": lambda i: f"k{i:03d}",
    "odd text": lambda i: ["", " ", "a", "a ", "A", "é", "e\u0301", "用户", "0", "00"][i % 10] + "~" * (i // 10),
}


@dataclass(frozen=True)
class Context:
    """One context column: its kind of feature, the type in the files, and whether it is a partition."""

    name: str
    kind: str  # categorical, numeric, list
    type: str  # int, text, bool, dictionary, float, lists
    declared: bool
    nulls: bool
    partition: bool = False
    min_count: int = 1

    @property
    def inside(self) -> str:
        """The column of the pandas events, apart from those of roles."""
        return f"context {self.name}"


@dataclass
class MadeLog:
    seed: int
    rows: int
    users: int
    items: int
    files: int
    user_key: str
    item_key: str
    time: str  # none, order, s, ms, us, ns, float, timestamp[...], date
    span: int  # seconds, or positions
    split: str
    label: str | None
    weight: str | None
    duplicates: bool
    context: list[Context]
    item_table: bool
    user_table: bool
    options: dict[str, Any]
    layout: str  # one folder, nested, glob, list
    odd_names: bool
    narrow: bool  # half of the files have int32 where the others have int64
    absent: bool  # half of the files lack the first context column
    empty_file: bool
    flaw: str | None
    frames: list[pd.DataFrame] = field(default_factory=list)  # of each file, in the order in which files are read

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.names = {
            "user": "who is it?" if self.odd_names else "user_id",
            "item": "商品" if self.odd_names else "item_id",
            "time": "a\tt" if self.odd_names else "ts",
            "label": "label",
            "weight": "w",
            "split": "part",
        }

    # ---- rows

    def events(self) -> pd.DataFrame:
        """All events in the order of the files: user, item, time in microseconds or positions, order, and so on."""
        if not self.frames:
            self._make()
        return pd.concat(self.frames, ignore_index=True)

    @property
    def timed(self) -> bool:
        return self.time not in ("none", "order")

    def _make(self) -> None:
        rng, n = self.rng, self.rows
        table: dict[str, Any] = {
            "user": [KEYS[self.user_key](int(i)) for i in rng.integers(0, self.users, n)],
            "item": [KEYS[self.item_key](int(i)) for i in np.minimum(rng.zipf(1.5, n), self.items)],
        }
        at = rng.integers(0, max(self.span, 1), n)
        if self.time in ("date",):
            at = at // DAY * DAY
        if self.timed:
            table["time"] = (START + at) * 1_000_000
        elif self.time == "order":
            table["time"] = at
        if self.label:
            table["label"] = (rng.random(n) < 0.6).astype(float)
        if self.weight:
            table["weight"] = rng.integers(0, 4, n).astype(float)
        if self.split == "given":
            table["split"] = [("train", "train", "train", "valid", "test")[i] for i in rng.integers(0, 5, n)]
        frame = pd.DataFrame(table)
        for column in self.context:
            frame[column.inside] = pd.Series([self._value(column) for _ in range(n)], dtype=object)
        if self.duplicates:
            again = frame.iloc[rng.integers(0, n, max(1, n // 5))].copy()
            if self.label:
                again["label"] = (rng.random(len(again)) < 0.6).astype(float)
            frame = pd.concat([frame, again], ignore_index=True)
        owner = np.sort(rng.integers(0, self.files, len(frame)))
        for column in self.context:
            if column.partition:  # one value a file
                values = [self._value(column) for _ in range(self.files)]
                frame[column.inside] = pd.Series([values[i] for i in owner], dtype=object)
        for column in self.context[:1]:
            if self.absent and self.files > 1 and not column.partition:
                values = frame[column.inside].tolist()
                values = [None if number % 2 else value for number, value in zip(owner, values, strict=True)]
                frame[column.inside] = pd.Series(values, dtype=object)
        self.frames = [frame[owner == i].reset_index(drop=True) for i in range(self.files)]

    def _value(self, column: Context) -> Any:
        rng = self.rng
        if column.nulls and rng.random() < 0.2:
            return None
        if column.type == "lists":
            entries: list[Any] = [f"t{i}" for i in rng.integers(0, 5, rng.integers(0, 4))]
            return [*entries, None] if column.nulls and rng.random() < 0.3 else entries
        if column.type == "float":
            odd = [float("nan"), float("inf"), -float("inf")]
            return odd[rng.integers(0, 3)] if column.nulls and rng.random() < 0.1 else float(rng.normal(5, 3))
        number = int(rng.integers(0, 6))
        return {"int": number, "bool": bool(number % 2), "text": f"c{number}", "dictionary": f"c{number}"}[column.type]

    # ---- files

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the files and return the table of the configuration."""
        self.events()
        root = folder / ("my log" if self.odd_names else "log")
        paths, order = [], []
        for i, frame in enumerate(self.frames):
            inside = [f"{c.name}={self._part(frame, c)}" for c in self.context if c.partition]
            inside += [f"n{i}"] if self.layout == "nested" else []
            path = root.joinpath(f"p{i:02d}", *inside, f"part-{i}.parquet") if inside else root / f"part-{i}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(self._arrow(frame, i), path, row_group_size=int(self.rng.integers(1, 40)))
            paths.append(str(path))
            # The number of an event: files in the order of their paths, rows in the order of the file.
            order.append(np.arange(len(frame)) + (i << 40))
        for frame, numbers in zip(self.frames, order, strict=True):
            frame["order"] = numbers
            if self.time == "none":
                frame["time"] = numbers
        if self.empty_file:
            nothing = self._arrow(self.frames[0], 0).slice(0, 0)
            pq.write_table(
                pa.table({name: pa.array([], pa.string()) for name in nothing.column_names}), root / "zzz.parquet"
            )
        (root / "_SUCCESS").write_text("")
        (root / ".part-0.parquet.crc").write_bytes(b"crc")
        return self._config(folder, root, paths)

    def _part(self, frame: pd.DataFrame, column: Context) -> str:
        value = frame[column.inside].iloc[0] if len(frame) else None
        return "__HIVE_DEFAULT_PARTITION__" if value is None else str(value)

    def _arrow(self, frame: pd.DataFrame, number: int) -> pa.Table:
        narrow = self.narrow and number % 2 == 1
        columns: dict[str, Any] = {}
        for role in ("user", "item"):
            kind = pa.string() if "text" in self.user_key_of(role) else pa.int64()
            if narrow and self.user_key_of(role) == "int":
                kind = pa.int32()
            if narrow and pa.types.is_string(kind):
                kind = pa.large_string()
            columns[self.names[role]] = pa.array(frame[role].tolist(), kind)
        if self.time != "none":
            columns[self.names["time"]] = self._times(frame["time"].to_numpy(dtype=np.int64))
        if self.label:
            values = frame["label"].tolist()
            columns[self.names["label"]] = pa.array(values).cast(
                {"int": pa.int8(), "bool": pa.bool_(), "float": pa.float32()}[self.label]
            )
        if self.weight:
            columns[self.names["weight"]] = pa.array(frame["weight"].tolist()).cast(
                {"int": pa.int64(), "float": pa.float64()}[self.weight]
            )
        if self.split == "given":
            columns[self.names["split"]] = pa.array(frame["split"].tolist(), pa.string())
        for column in self.context:
            if not column.partition and not (self.absent and number % 2 and column is self.context[0]):
                columns[column.name] = _typed(frame[column.inside].tolist(), column.type)
        if self.flaw and number == 0 and len(frame):
            self._spoil(columns)
        names = list(columns)
        self.rng.shuffle(names)  # files need not agree in the order of columns
        return pa.table({name: columns[name] for name in names})

    def user_key_of(self, role: str) -> str:
        return self.user_key if role == "user" else self.item_key

    def _times(self, micro: np.ndarray) -> pa.Array:
        if self.time == "order":
            return pa.array(micro)
        if self.time == "date":
            return pa.array((micro // (DAY * 1_000_000)).astype(np.int32)).cast(pa.date32())
        if self.time.startswith("timestamp"):
            unit = self.time.removeprefix("timestamp ")
            zone = "Asia/Kolkata" if unit == "ms" else None
            return pa.array(micro).cast(pa.timestamp("us", zone)).cast(pa.timestamp(unit, zone))
        if self.time == "float":
            return pa.array(micro / 1e6)
        return pa.array(micro // {"s": 1_000_000, "ms": 1_000, "us": 1}[self.time])

    def _spoil(self, columns: dict[str, Any]) -> None:
        """One value that prepare has to refuse."""
        role = {
            "null user": "user",
            "label 2": "label",
            "weight -1": "weight",
            "null time": "time",
            "split x": "split",
        }[self.flaw or ""]
        name = self.names[role]
        values = columns[name].to_pylist()
        values[0] = {"label 2": 2, "weight -1": -1, "split x": "x"}.get(self.flaw or "")
        kind = pa.int64() if self.flaw == "label 2" else columns[name].type
        columns[name] = pa.array([int(v) for v in values] if self.flaw == "label 2" else values, kind)

    @property
    def flawed_column(self) -> str | None:
        roles = {
            "null user": "user",
            "label 2": "label",
            "weight -1": "weight",
            "null time": "time",
            "split x": "split",
        }
        return self.names[roles[self.flaw]] if self.flaw and len(self.frames[0]) else None

    # ---- side tables and configuration

    def side_table(self, role: str) -> pd.DataFrame | None:
        """Keys, half of which the log has, with a category, a number, and a list."""
        if not (self.item_table if role == "item" else self.user_table):
            return None
        rng = np.random.default_rng(self.seed + (1 if role == "item" else 2))
        many = self.items if role == "item" else self.users
        numbers = rng.permutation(many * 2)[: many + 2]
        return pd.DataFrame(
            {
                "key": [KEYS[self.user_key_of(role)](int(i)) for i in numbers],
                "brand": pd.Series([None if rng.random() < 0.2 else f"b{i % 4}" for i in numbers], dtype=object),
                "price": pd.Series([None if rng.random() < 0.2 else float(i) for i in numbers], dtype=object),
                "tags": pd.Series([[f"t{i % 3}"] * (i % 3) for i in numbers], dtype=object),
            }
        )

    def side_features(self) -> dict[str, dict[str, Any]]:
        return {
            "brand": {"kind": "categorical", "min_count": 2},
            "price": {"kind": "numeric"},
            "tags": {"kind": "list"},
        }

    def _config(self, folder: Path, root: Path, paths: list[str]) -> dict[str, Any]:
        path: Any = {"glob": f"{root}/*.parquet", "list": paths}.get(self.layout, str(root))
        if any(c.partition for c in self.context) or self.layout == "nested":
            path = str(root)
        if self.empty_file and isinstance(path, list):
            path = [*path, str(root / "zzz.parquet")]
        columns: dict[str, Any] = {role: self.names[role] for role in ("user", "item")}
        columns |= {"timestamp": self.names["time"]} if self.time != "none" else {}
        columns |= {role: self.names[role] for role in ("label", "weight") if getattr(self, role)}
        columns |= {"split": self.names["split"]} if self.split == "given" else {}
        columns["context"] = [column.name for column in self.context]
        data: dict[str, Any] = {"path": path, "columns": columns, **self.options}
        data["split"] = {"kind": self.split, "valid": 0.2, "test": 0.2}
        data["timestamp_unit"] = "order" if self.time == "order" else "auto"
        data["context_features"] = {
            c.name: {"kind": c.kind} | ({"min_count": c.min_count} if c.kind != "numeric" else {})
            for c in self.context
            if c.declared
        }
        for role in ("item", "user"):
            table = self.side_table(role)
            if table is not None:
                arrow = pa.table(
                    {
                        self.names[role]: pa.array(
                            table["key"].tolist(), pa.string() if "text" in self.user_key_of(role) else pa.int64()
                        ),
                        **{
                            name: _typed(table[name].tolist(), kind)
                            for name, kind in (("brand", "text"), ("price", "float"), ("tags", "lists"))
                        },
                        "unused": pa.array(range(len(table))),
                    }
                )
                pq.write_table(arrow, folder / f"{role}s.parquet")
                data |= {f"{role}s": str(folder / f"{role}s.parquet"), f"{role}_features": self.side_features()}
        return {"run": {"output": str(folder / "runs")}, "data": data}


def _typed(values: list[Any], kind: str) -> pa.Array:
    types = {
        "int": pa.int64(),
        "bool": pa.bool_(),
        "text": pa.string(),
        "float": pa.float64(),
        "lists": pa.list_(pa.string()),
    }
    if kind == "dictionary":
        return pa.array(values, pa.string()).dictionary_encode()
    return pa.array(values, types[kind])


@st.composite
def contexts(draw: st.DrawFn) -> list[Context]:
    usual = ["device", "hour", "tags"]
    names = draw(st.permutations(usual + ODD_NAMES + TAKEN_NAMES))
    found = []
    for name in names[: draw(st.integers(0, 3))]:
        kind = draw(st.sampled_from(["categorical", "numeric", "list"]))
        types = {
            "categorical": ["int", "text", "bool", "dictionary"],
            "numeric": ["float", "int", "bool"],
            "list": ["lists"],
        }
        chosen = draw(st.sampled_from(types[kind]))
        by_type = {"float": "numeric", "lists": "list"}.get(chosen, "categorical")
        declared = draw(st.booleans()) or kind != by_type
        partition = chosen in ("int", "text") and kind == "categorical" and name in usual and draw(st.booleans())
        found.append(
            Context(
                name,
                kind,
                chosen,
                declared,
                draw(st.booleans()),
                partition,
                draw(st.sampled_from([1, 1, 5])) if declared else 1,
            )
        )
    return found


@st.composite
def made_logs(draw: st.DrawFn) -> MadeLog:
    time = draw(
        st.sampled_from(
            ["s", "ms", "us", "float", "timestamp us", "timestamp ms", "timestamp ns", "date", "order", "none"]
        )
    )
    kinds = ["leave_last", "given"] + (["temporal"] * 3 if time != "none" else [])
    label = draw(st.sampled_from([None, None, "int", "bool", "float"]))
    weight = draw(st.sampled_from([None, None, "int", "float"]))
    split = draw(st.sampled_from(kinds))
    flaws = ["null user"] + ["label 2"] * (label is not None) + ["weight -1"] * (weight is not None)
    flaws += ["null time"] * (time not in ("none", "float")) + ["split x"] * (split == "given")
    options = {
        "drop_duplicates": draw(st.booleans()),
        "min_user_events": draw(st.sampled_from([0, 0, 1, 3])),
        "min_item_events": draw(st.sampled_from([1, 1, 2, 5])),
        "k_core": draw(st.sampled_from([False, False, True])),
        "min_history": draw(st.sampled_from([0, 0, 1, 2])),
        "shard_events": draw(st.sampled_from([20, 1_000])),
    }
    return MadeLog(
        seed=draw(st.integers(0, 2**32 - 1)),
        rows=draw(st.integers(20, 160)),
        users=draw(st.integers(1, 25)),
        items=draw(st.integers(1, 20)),
        files=draw(st.integers(1, 4)),
        user_key=draw(st.sampled_from(list(KEYS))),
        item_key=draw(st.sampled_from(list(KEYS))),
        time=time,
        span=draw(st.sampled_from([3, 500, 5 * DAY, 200 * DAY]))
        if time != "order"
        else draw(st.sampled_from([3, 500])),
        split=split,
        label=label,
        weight=weight,
        duplicates=draw(st.booleans()),
        context=draw(contexts()),
        item_table=draw(st.booleans()),
        user_table=draw(st.booleans()),
        options=options,
        layout=draw(st.sampled_from(["folder", "nested", "glob", "list"])),
        odd_names=draw(st.booleans()),
        narrow=draw(st.booleans()),
        absent=draw(st.booleans()),
        empty_file=draw(st.booleans()),
        flaw=draw(st.sampled_from([None] * 8 + flaws)),
    )


# ---- any schema, for `recray init`

_COLUMNS: dict[str, Callable[[np.random.Generator, int], Any]] = {
    "few": lambda rng, n: rng.integers(0, 6, n),
    "many": lambda rng, n: rng.integers(0, 2**62, n),
    "keys": lambda rng, n: np.arange(n),
    "small": lambda rng, n: pa.array(rng.integers(0, 100, n).tolist(), pa.uint8()),
    "real": lambda rng, n: rng.normal(size=n),
    "whole": lambda rng, n: rng.integers(0, 30, n).astype(float),
    "zero or one": lambda rng, n: rng.integers(0, 2, n),
    "bool": lambda rng, n: rng.integers(0, 2, n).astype(bool),
    "ratings": lambda rng, n: rng.integers(1, 6, n),
    "text": lambda rng, n: [f"v{i}" for i in rng.integers(0, 9, n)],
    "prose": lambda rng, n: [f"row {i} says at some length what happened in it" for i in range(n)],
    "hashes": lambda rng, n: [f"{i:032x}" for i in rng.integers(0, 2**60, n)],
    "iso": lambda rng, n: [str(np.datetime64(int(i), "s")) for i in rng.integers(START, START + 90 * DAY, n)],
    "american": lambda rng, n: [f"{i % 12 + 1}/{i % 28 + 1}/2020 9:05:58 AM" for i in rng.integers(0, 999, n)],
    "seconds": lambda rng, n: rng.integers(START, START + 90 * DAY, n),
    "milliseconds": lambda rng, n: rng.integers(START, START + 90 * DAY, n) * 1_000,
    "stamp": lambda rng, n: (
        pa.array(rng.integers(START, START + 90 * DAY, n)).cast(pa.timestamp("s")).cast(pa.timestamp("ns"))
    ),
    "date": lambda rng, n: pa.array(rng.integers(19_000, 19_090, n).astype(np.int32)).cast(pa.date32()),
    "clock": lambda rng, n: pa.array(rng.integers(0, DAY, n).astype(np.int32)).cast(pa.time32("s")),
    "decimal": lambda rng, n: pa.array(rng.integers(0, 99, n)).cast(pa.decimal128(38, 0)),
    "dictionary": lambda rng, n: pa.array([f"d{i}" for i in rng.integers(0, 9, n)]).dictionary_encode(),
    "tags": lambda rng, n: [[f"t{k}" for k in range(i)] for i in rng.integers(0, 4, n)],
    "vector": lambda rng, n: pa.array(rng.normal(size=(n, 8)).tolist(), pa.list_(pa.float32())),
    "bytes": lambda rng, n: pa.array([b"\xff\xfe" + bytes([i]) for i in rng.integers(0, 255, n)], pa.binary()),
    "struct": lambda rng, n: [{"a": int(i)} for i in rng.integers(0, 9, n)],
    "nulls": lambda rng, n: pa.nulls(n),
    "typed nulls": lambda rng, n: pa.nulls(n, pa.float64()),
    "constant": lambda rng, n: ["x"] * n,
}
_ROLE_NAMES = [
    "user_id",
    "visitorid",
    "session",
    "itemId",
    "sku",
    "ad id",
    "timestamp",
    "created_at",
    "date",
    "label",
    "clicked",
    "weight",
]
_ROLE_NAMES += ["rating", "position", "event", "split", "id", "key", "time", "user", "item", "count"]


@dataclass(frozen=True)
class Schema:
    seed: int
    rows: int
    files: int
    usual: bool  # user_id, item_id and a time are among the columns
    columns: dict[str, str]  # name -> kind of values
    nulls: frozenset[str]
    partition: str | None

    def write(self, folder: Path) -> str:
        rng = np.random.default_rng(self.seed)
        usual: dict[str, Any] = {}
        if self.usual:
            usual = {
                "user_id": rng.integers(0, 12, self.rows),
                "item_id": rng.integers(0, 30, self.rows),
                "ts": _COLUMNS["seconds"](rng, self.rows),
            }
        made = {name: pa.array(_COLUMNS[kind](rng, self.rows)) for name, kind in self.columns.items()}
        for name in self.nulls:
            gone = pa.array(rng.random(self.rows) < 0.2)
            made[name] = pa.array(
                [None if out else v for out, v in zip(gone.to_pylist(), made[name].to_pylist(), strict=True)],
                made[name].type,
            )
        table = pa.table(made | usual)
        step = -(-self.rows // self.files)
        for i in range(self.files):
            inside = folder / "log" / (f"{self.partition}={i}" if self.partition else "")
            inside.mkdir(parents=True, exist_ok=True)
            pq.write_table(table.slice(i * step, step), inside / f"{i}.parquet", row_group_size=50)
        return str(folder / "log")


@st.composite
def schemas(draw: st.DrawFn) -> Schema:
    any_name = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
    usual = draw(st.booleans())
    names = draw(
        st.lists(st.one_of(st.sampled_from(_ROLE_NAMES), any_name), min_size=0 if usual else 1, max_size=8, unique=True)
    )
    taken = {"user_id", "item_id", "ts"} if usual else set()
    columns = {name: draw(st.sampled_from(list(_COLUMNS))) for name in names if name not in taken}
    plain = [name for name, kind in columns.items() if kind not in ("dictionary", "nulls", "struct", "vector", "tags")]
    nulls = frozenset(draw(st.lists(st.sampled_from(plain), max_size=2))) if plain else frozenset()
    partition = draw(st.sampled_from([None, None, "day", "user"]))
    return Schema(
        draw(st.integers(0, 2**32 - 1)),
        draw(st.integers(60, 300)),
        draw(st.integers(1, 5)),
        usual,
        columns,
        nulls,
        None if partition in columns else partition,
    )
