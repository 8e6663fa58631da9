"""Writes events.parquet and items.parquet from a MovieLens archive (https://grouplens.org/datasets/movielens/).

    python jobs/examples/movielens_to_parquet.py ml-1m.zip data/
    recray run jobs/configs/ml-1m.toml --set data.path=data/events.parquet --set data.timestamp_unit=s

Reads ml-100k, ml-1m, ml-10m, ml-20m, ml-25m and ml-32m. Events: user_id, item_id, rating, timestamp (seconds); items:
item_id, title, year, genres (ml-100k: without genres).
"""

from __future__ import annotations

import csv
import io
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv as pacsv

# Ratings, titles, delimiter and encoding of each generation; ml-1m alone is latin-1 among those with '::'.
_FORMATS = [
    ("u.data", "u.item", "\t", "latin-1"),
    ("ratings.dat", "movies.dat", "::", "utf-8"),
    ("ratings.csv", "movies.csv", ",", "utf-8"),
]
_EVENTS = ["user_id", "item_id", "rating", "timestamp"]


def convert(archive: str, folder: str) -> None:
    with zipfile.ZipFile(archive) as opened:
        files = {name.rpartition("/")[2]: opened.read(name) for name in opened.namelist() if not name.endswith("/")}
    found = [one for one in _FORMATS if one[0] in files]
    if not found:
        raise SystemExit(f"{archive} is no MovieLens archive: it has none of {', '.join(one[0] for one in _FORMATS)}")
    ratings, titles, delimiter, encoding = found[0]
    # pyarrow splits at single characters only.
    plain = io.BytesIO(files[ratings].replace(b"::", b"\t"))
    parse = pacsv.ParseOptions(delimiter="\t" if delimiter == "::" else delimiter)
    read = pacsv.ReadOptions(column_names=_EVENTS, skip_rows=1 if delimiter == "," else 0)
    Path(folder).mkdir(parents=True, exist_ok=True)
    pq.write_table(pacsv.read_csv(plain, read, parse), Path(folder, "events.parquet"))
    pq.write_table(
        pa.Table.from_pylist(list(_items(files[titles], delimiter, encoding))), Path(folder, "items.parquet")
    )


def _items(data: bytes, delimiter: str, encoding: str) -> Iterator[dict[str, object]]:
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    if delimiter == ",":
        rows = list(csv.reader(io.StringIO(text)))[1:]
    else:
        rows = [line.split("|" if delimiter == "\t" else delimiter) for line in text.splitlines()]
    for item, title, genres, *_ in rows:
        year = re.search(r"\((\d{4})\)", title)
        found = {"item_id": int(item), "title": title, "year": int(year[1]) if year else None}
        yield found if delimiter == "\t" else {**found, "genres": genres.split("|")}


if __name__ == "__main__":
    convert(*sys.argv[1:])
