"""Ray's tasks and Ray Data's blocks in the test's own process: a whole `prepare` of a small log takes milliseconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest

from recray.cluster import runtime
from recray.config import Config
from recray.data import partition
from recray.records import DatasetRecord

TIME_BINS = 20_000  # instead of a million, which cost more than all else of a small log


@dataclass(frozen=True)
class InlineTasks:
    """Stands for `ray.data.from_items(rows)` and for what its map_batches returns, as far as sources and prepare use them."""

    rows: list[dict[str, Any]]
    steps: tuple[Callable[[pa.Table], Iterable[pa.Table]], ...] = ()

    def map_batches(
        self, work: Callable[..., Any], *, fn_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> InlineTasks:
        assert options.pop("batch_format") == "pyarrow"

        def step(batch: pa.Table) -> Iterable[pa.Table]:
            made = work(batch, **(fn_kwargs or {}))
            return [made] if isinstance(made, pa.Table) else made

        return InlineTasks(self.rows, (*self.steps, step))

    def tables(self) -> Iterator[pa.Table]:
        """The events of every task, in order of the tasks."""
        for row in self.rows:
            yield from self._after(pa.Table.from_pylist([row]), self.steps)

    def to_arrow_refs(self) -> list[pa.Table]:
        return list(self.tables())

    def _after(
        self, table: pa.Table, steps: tuple[Callable[[pa.Table], Iterable[pa.Table]], ...]
    ) -> Iterator[pa.Table]:
        if not steps:
            yield table
            return
        for made in steps[0](table):
            yield from self._after(made, steps[1:])


@dataclass(frozen=True)
class _Remote:
    """Stands for `ray.remote(function)`; a reference is the result itself."""

    function: Callable[..., Any]

    def options(self, **_: Any) -> _Remote:
        return self

    def remote(self, *args: Any) -> Any:
        return self.function(*args)


def _modules() -> dict[str, ModuleType]:
    ray, data = ModuleType("ray"), ModuleType("ray.data")
    data.__dict__["from_items"] = lambda rows, override_num_blocks: InlineTasks(rows)
    ray.__dict__.update(
        data=data, remote=_Remote, get=lambda refs: refs, wait=lambda refs, **_: (refs, []), put=lambda value: value
    )
    return {"ray": ray, "ray.data": data}


@contextmanager
def inline_ray() -> Iterator[None]:
    """Inside the block `ray` is a stand-in that runs every task at once, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in _modules().items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(runtime, "start", lambda *_: None)
        yield


def inline_prepare(config: Config) -> DatasetRecord:
    """`recray.prepare` in this process, with TIME_BINS bins of time."""
    from recray.data.prepare import prepare

    with inline_ray(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition, "_TIME_BINS", TIME_BINS)
        return prepare(config)
