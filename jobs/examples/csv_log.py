"""A source of your own: CSV files with a header, one Ray task per file.

[data]
source = "csv_log"
path = "logs/*.csv"            # a local glob
[data.csv_log]
delimiter = ";"
"""

from __future__ import annotations

import glob
import hashlib
import os

import pyarrow as pa
import ray.data
from pyarrow import csv
from pydantic import Field

from recray.config import DataConfig, SourceOptions
from recray.data.sources import base
from recray.data.sources.base import Source
from recray.errors import DataError


class Options(SourceOptions):
    delimiter: str = Field(",", min_length=1, max_length=1, description="character between two columns")


def read(config: DataConfig, seed: int) -> Source:
    files = sorted(glob.glob(str(config.path)))
    if not files:
        raise DataError(f"data.path = '{config.path}' matches no CSV file; check the glob")
    sizes = [(file, os.path.getsize(file), os.stat(file).st_mtime_ns) for file in files]
    work = ray.data.from_items([{"file": file, "number": n} for n, file in enumerate(files)])
    return Source(
        events=work.map_batches(_rows, batch_size=1, batch_format="pyarrow", fn_kwargs={"config": config}),
        num_events=sum(size for _, size, _ in sizes) // 20,  # a guess; it decides how many tasks prepare uses
        fingerprint=hashlib.sha256(repr(sizes).encode()).hexdigest(),  # prepare runs again if a file changes
    )


def _rows(batch: pa.Table, config: DataConfig) -> pa.Table:
    """The events of one file in standard columns (recray.data.sources.base)."""
    file, number = batch["file"][0].as_py(), batch["number"][0].as_py()
    table = csv.read_csv(file, parse_options=csv.ParseOptions(delimiter=config.options.delimiter))  # type: ignore[attr-defined]
    time = table[config.columns.timestamp]
    return pa.table(
        {
            "user": base.ids(table[config.columns.user], file),
            "item": base.ids(table[config.columns.item], file),
            "time": base.microseconds(time, base.infer_unit(time, file), file),
            "order": pa.array(range(number << 32, (number << 32) + len(table))),  # unique over all files
        }
    )
