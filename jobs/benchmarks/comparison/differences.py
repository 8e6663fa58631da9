"""Two results against each other, to the last bit, and in words where they differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.comparison.adapter import EXCLUDED, renamed

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

_ABSENT = "absent"
_KEPT = 20  # differences of a quantity that are written as JSON


@dataclass(frozen=True)
class Difference:
    where: str
    base: Any
    here: Any

    @property
    def size(self) -> float:
        """Of two numbers; of anything else infinite, so that it is named first."""
        if _number(self.base) and _number(self.here):
            size = abs(float(self.base) - float(self.here))
            return math.inf if math.isnan(size) else size
        return math.inf


@dataclass
class Outcome:
    """What was found of one quantity of one run."""

    run: str
    quantity: str
    compared: int = 0  # numbers, texts
    unit: str = "values"
    differences: list[Difference] = field(default_factory=list)
    more: list[str] = field(default_factory=list)  # only there in the checkout: no difference
    error: str = ""

    @property
    def identical(self) -> bool:
        return not self.differences and not self.error

    def line(self) -> str:
        if self.error:
            return f"ERROR {self.error}"
        more = f"; only here: {', '.join(self.more[:5])}{' ...' if len(self.more) > 5 else ''}" if self.more else ""
        if not self.differences:
            return f"identical  ({self.compared:,} {self.unit}{more})"
        worst = max(self.differences, key=lambda one: one.size)
        size = "" if math.isinf(worst.size) else f"largest {worst.size:.3g} "
        return (
            f"DIFFERENT  {len(self.differences):,} of {self.compared:,} {self.unit}; {size}at {worst.where}: "
            f"base {_short(worst.base)}, here {_short(worst.here)}; first at {self.differences[0].where}{more}"
        )

    def as_json(self) -> dict[str, Any]:
        body = asdict(self) | {"identical": self.identical, "different": len(self.differences)}
        return body | {"differences": body["differences"][:_KEPT]}

    # What follows adds what it finds.

    def values(self, base: Any, here: Any, where: str = "") -> Outcome:
        """Two JSON values, names as they are now. What only `here` has is no difference."""
        self._tree(renamed(base), renamed(here), where)
        return self

    def tensors(self, base: Mapping[str, np.ndarray], here: Mapping[str, np.ndarray]) -> Outcome:
        for name, mine in base.items():
            if name not in here:
                self.compared += mine.size
                self.differences.append(Difference(name, f"{mine.dtype}{list(mine.shape)}", _ABSENT))
                continue
            self._tensor(name, mine, here[name])
        self.more += [name for name in here if name not in base]
        return self

    def tables(self, base: Mapping[str, pa.Table], here: Mapping[str, pa.Table]) -> Outcome:
        for name, mine in base.items():
            if name not in here:
                self.differences.append(Difference(name, f"{len(mine)} rows", _ABSENT))
            else:
                self._table(name, mine, here[name])
        self.more += [name for name in here if name not in base]
        return self

    def _tree(self, base: Any, here: Any, where: str) -> None:
        if isinstance(base, Mapping) and isinstance(here, Mapping):
            for key in base:
                nothing = base[key] is None and key not in here  # a field that held nothing may leave
                if key not in EXCLUDED and not nothing:
                    self._tree(base[key], here.get(key, _ABSENT), f"{where}.{key}".lstrip("."))
            self.more += [f"{where}.{key}".lstrip(".") for key in here if key not in base and key not in EXCLUDED]
        elif _listed(base) and _listed(here):
            if len(base) != len(here):
                self.differences.append(Difference(f"length of {where}", len(base), len(here)))
            for at, (one, other) in enumerate(zip(base, here, strict=False)):
                self._tree(one, other, f"{where}[{at}]")
        else:
            self.compared += 1
            if not _same(base, here):
                self.differences.append(Difference(where, base, here))

    def _tensor(self, name: str, base: np.ndarray, here: np.ndarray) -> None:
        import numpy as np

        self.compared += base.size
        if base.dtype != here.dtype or base.shape != here.shape:
            of_base, of_here = (f"{one.dtype}{list(one.shape)}" for one in (base, here))
            self.differences.append(Difference(name, of_base, of_here))
            return
        if base.tobytes() == here.tobytes():
            return
        width = base.dtype.itemsize
        bytes_base, bytes_here = (np.frombuffer(one.tobytes(), np.uint8).reshape(-1, width) for one in (base, here))
        places = np.flatnonzero((bytes_base != bytes_here).any(axis=1))
        for place in places.tolist():
            index = ", ".join(str(int(i)) for i in np.unravel_index(place, base.shape))
            self.differences.append(
                Difference(f"{name}[{index}]", base.reshape(-1)[place].item(), here.reshape(-1)[place].item())
            )

    def _table(self, name: str, base: pa.Table, here: pa.Table) -> None:
        self.compared += sum(_values(column) for column in base.columns)
        if _bytes(base) == _bytes(here):
            return
        before = self.compared
        columns = dict(zip(here.column_names, here.columns, strict=True))
        for column, mine in zip(base.column_names, base.columns, strict=True):
            where = f"{name}:{column}"
            if column not in columns:
                self.differences.append(Difference(where, str(mine.type), _ABSENT))
            elif columns[column].type != mine.type:
                self.differences.append(Difference(where, str(mine.type), str(columns[column].type)))
            else:
                self._tree(mine.to_pylist(), columns[column].to_pylist(), where)
        self.compared = before
        self.more += [f"{name}:{column}" for column in columns if column not in base.column_names]


def _values(column: pa.ChunkedArray) -> int:
    """Of lists their entries."""
    import pyarrow.compute as pc
    import pyarrow.types as kinds

    listed = kinds.is_list(column.type) or kinds.is_large_list(column.type) or kinds.is_fixed_size_list(column.type)
    return _values(pc.list_flatten(column)) if listed else len(column)


def _bytes(table: pa.Table) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
        for batch in table.replace_schema_metadata(None).combine_chunks().to_batches():
            writer.write_batch(batch)
    return bytes(sink.getvalue())


def points_by_setting(curve: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """An index's sweep: its measures by setting, whatever the order."""
    return {", ".join(f"{k} {v}" for k, v in sorted(point["setting"].items())) or "exact": point for point in curve}


def _same(base: Any, here: Any) -> bool:
    if _number(base) and _number(here) and float in (type(base), type(here)):
        return float(base).hex() == float(here).hex()  # tells 0.0 from -0.0, and NaN is NaN
    return type(base) is type(here) and bool(base == here)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _listed(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value!r} ({value.hex()})"
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
