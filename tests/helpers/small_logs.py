"""Small Parquet logs of the usual columns, and the section `data` that reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recray.config import DataConfig

DAY = 86_400
START = 1_600_000_000


def events(rows: int = 6, **changes: Any) -> pa.Table:
    columns: dict[str, Any] = {
        "user_id": np.arange(rows) % 3,
        "item_id": np.arange(rows) * 10,
        "timestamp": START + np.arange(rows) * DAY,
    }
    return pa.table({name: value for name, value in (columns | changes).items() if value is not None})


def write(path: Path, table: pa.Table, **options: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return str(path)


def config_of(path: Any, columns: dict[str, Any] | None = None, **data: Any) -> DataConfig:
    columns = {"timestamp": "timestamp", **(columns or {})}
    return DataConfig.model_validate({"path": path, "columns": columns, **data})
