"""Ray Data's tasks in the test's own process: dozens of small files are read in milliseconds, by the source's public `read`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pytest

from recray.config import DataConfig
from recray.data.sources import parquet


@dataclass(frozen=True)
class InlineTasks:
    """Stands for `ray.data.from_items(rows)` and for what its map_batches returns, as far as sources use them."""

    rows: list[dict[str, Any]]
    work: Callable[[pa.Table], Iterator[pa.Table]] | None = None

    def map_batches(
        self, work: Callable[..., Iterator[pa.Table]], *, batch_size: int, batch_format: str, fn_kwargs: dict[str, Any]
    ) -> InlineTasks:
        assert (batch_size, batch_format) == (1, "pyarrow")  # a task reads one row of the plan
        return InlineTasks(self.rows, lambda batch: work(batch, **fn_kwargs))

    def tables(self) -> Iterator[pa.Table]:
        """The events of every task, in order of the tasks."""
        assert self.work is not None
        for row in self.rows:
            yield from self.work(pa.Table.from_pylist([row]))


def inline_events(config: DataConfig) -> InlineTasks:
    """The events of the Parquet source, to be read in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.data.from_items", lambda rows, override_num_blocks: InlineTasks(rows))
        events: Any = parquet.read(config, seed=1).events
    assert isinstance(events, InlineTasks)
    return events
