"""MovieLens, as published (https://grouplens.org/datasets/movielens/): an unpacked archive, or a download.

`data.path` names a folder that holds an archive's files. Without it the archive is
fetched by URL into a cache folder (RECRAY_CACHE, else ~/.cache/recray) and checked
against its published MD5.

A rating of at least `data.movielens.min_rating` is an event. The column `rating` is
there for data.columns.weight or data.columns.context. Items have `title`, `year` and
`genres` (list); ml-100k and ml-1m have users with `gender`, `age`, `occupation`.

Files are small (25 million ratings at most), so one task streams them.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from recray import storage
from recray.config import DataConfig
from recray.data.sources import base
from recray.data.sources.base import Source
from recray.errors import ConfigError, DataError, StorageError

URL = "https://files.grouplens.org/datasets/movielens/{name}.zip"
# The .md5 files beside the archives; ml-10m has none that is known here.
_MD5 = {
    "ml-100k": "0e33842e24a9c977be4e0107933c0723",
    "ml-1m": "c4d9eecfca2ab87c1945afe126590906",
    "ml-20m": "cd245b17a1ae2cc31bb14903e1204af3",
    "ml-25m": "6b51fb2759a8657d3bfcbfc42b592ada",
}
_CHUNK_BYTES = 16 << 20
_GENRES_100K = [
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
]


@dataclass(frozen=True)
class _Format:
    """How one generation of archives writes its files."""

    ratings: str
    items: str
    users: str | None
    delimiter: str
    encoding: str
    header: bool = False


_PLAIN = _Format("u.data", "u.item", "u.user", "\t", "latin-1")
_COLONS = _Format("ratings.dat", "movies.dat", "users.dat", "::", "latin-1")
_FORMATS = {
    "ml-100k": _PLAIN,
    "ml-1m": _COLONS,
    "ml-10m": _Format("ratings.dat", "movies.dat", None, "::", "utf-8"),
    "ml-20m": _Format("ratings.csv", "movies.csv", None, ",", "utf-8", header=True),
    "ml-25m": _Format("ratings.csv", "movies.csv", None, ",", "utf-8", header=True),
}


def read(config: DataConfig, seed: int) -> Source:
    """Ratings as events. Raises DataError, or StorageError where the archive cannot be fetched."""
    import ray.data

    options = config.movielens
    form = _FORMATS[options.name]
    if isinstance(config.path, list):
        raise ConfigError("data.path of source 'movielens' is one folder: that of the unpacked archive")
    folder = config.path or fetch(options.name)
    missing = [n for n in (form.ratings, form.items) if not storage.exists(storage.join(folder, n))]
    if missing:
        raise DataError(
            f"{folder} has no file '{missing[0]}', which {options.name} has: set data.path to the folder of the "
            f"unpacked archive and data.movielens.name to its name, or leave data.path out to download it"
        )
    unknown = [name for name in config.columns.context if name != "rating"]
    if unknown:
        raise ConfigError(f"data.columns.context: MovieLens has no column '{unknown[0]}'; there is 'rating'")
    uri = storage.join(folder, form.ratings)
    info = storage.list_files(uri, suffix="")[0]
    work = ray.data.from_items([{"uri": uri}], override_num_blocks=1)
    users = form.users and storage.exists(storage.join(folder, form.users))
    return Source(
        events=work.map_batches(_read_ratings, batch_size=1, batch_format="pyarrow", fn_kwargs={"config": config}),
        num_events=max(1, info.size // 22),  # bytes of a rating, about
        fingerprint=storage.fingerprint([info]),
        items=_items(storage.join(folder, form.items), form),
        users=_users(storage.join(folder, form.users), form) if users and form.users else None,
    )


def fetch(name: str) -> str:
    """The folder of the unpacked archive, downloaded once."""
    cache = Path(os.environ.get("RECRAY_CACHE") or Path.home() / ".cache" / "recray")
    found = _unpacked(cache / name, name)
    if found:
        return found
    url = URL.format(name=name)
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            data = response.read()
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        raise StorageError(
            f"{url} cannot be downloaded ({error}): without a network, unpack the "
            f"archive yourself and set data.path to its folder"
        ) from error
    digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if digest != _MD5.get(name, digest):
        raise DataError(f"{url} has MD5 {digest}, published is {_MD5[name]}: the download is broken; run again")
    part = cache / f"{name}.{os.getpid()}.part"
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        archive.extractall(part)
    (cache / name).parent.mkdir(parents=True, exist_ok=True)
    if not (cache / name).exists():
        os.replace(part, cache / name)
    folder = _unpacked(cache / name, name)
    if folder is None:
        raise DataError(f"{url} holds no '{_FORMATS[name].ratings}': delete {cache / name} and run again")
    return folder


def _unpacked(folder: Path, name: str) -> str | None:
    hits = sorted(folder.rglob(_FORMATS[name].ratings)) if folder.exists() else []
    return str(hits[0].parent) if hits else None


def _read_ratings(batch: pa.Table, config: DataConfig) -> Iterator[pa.Table]:
    form = _FORMATS[config.movielens.name]
    start = 0
    for uri in batch["uri"].to_pylist():
        for table in _ratings(uri, form):
            out = _events(table, start, config, uri)
            start += table.num_rows
            yield out


def _ratings(uri: str, form: _Format) -> Iterator[pa.Table]:
    """Blocks of user, item, rating, time (seconds)."""
    system, path = storage.resolve(uri)
    names = ["user", "item", "rating", "time"]
    types = {"user": pa.int64(), "item": pa.int64(), "rating": pa.float32(), "time": pa.int64()}
    with system.open_input_stream(path) as stream:
        rest = b""
        first = form.header
        while True:
            chunk = stream.read(_CHUNK_BYTES)
            text, _, tail = (rest + chunk).rpartition(b"\n") if chunk else (rest, b"", b"")
            rest = tail
            if first:
                text, first = text.partition(b"\n")[2], False
            if text.strip():
                text = text.replace(b"::", b"\t")
                try:
                    yield pacsv.read_csv(
                        pa.BufferReader(text),
                        read_options=pacsv.ReadOptions(column_names=names, use_threads=False),
                        parse_options=pacsv.ParseOptions(delimiter="," if form.delimiter == "," else "\t"),
                        convert_options=pacsv.ConvertOptions(column_types=types),
                    )
                except pa.ArrowInvalid as error:
                    raise DataError(
                        f"{uri} is not a whole MovieLens file: {error}; unpack the archive again"
                    ) from error
            if not chunk:
                return


def _events(table: pa.Table, start: int, config: DataConfig, where: str) -> pa.Table:
    out = {
        "user": table["user"],
        "item": table["item"],
        "time": base.microseconds(table["time"], "s", f"{where}: the timestamp"),
        "order": pa.array(np.arange(start, start + table.num_rows, dtype=np.int64)),
    }
    if config.columns.weight == "rating":
        out["weight"] = table["rating"]
    if "rating" in config.columns.context:
        out["rating"] = table["rating"].cast(pa.float64())
    return pa.table(out).filter(pc.greater_equal(table["rating"], config.movielens.min_rating))


def _lines(uri: str, form: _Format) -> list[str]:
    return [line for line in storage.read_bytes(uri).decode(form.encoding).splitlines() if line.strip()]


def _items(uri: str, form: _Format) -> pa.Table:
    """Columns item, title, year (null where the title has none), genres."""
    keys: list[int] = []
    titles: list[str] = []
    genres: list[list[str]] = []
    lines = _lines(uri, form)
    for number, line in enumerate(lines[1:] if form.header else lines, start=1):
        try:
            if form.ratings == "u.data":
                key, title, *flags = line.split("|")
                kinds = [
                    name for name, flag in zip(_GENRES_100K, flags[-len(_GENRES_100K) :], strict=True) if flag == "1"
                ]
            elif form.header:
                key, _, both = line.partition(",")
                title, _, last = both.rpartition(",")
                title, kinds = title.strip('"').replace('""', '"'), last.split("|")
            else:
                key, title, last = line.split("::")
                kinds = last.split("|")
            keys.append(int(key))
        except ValueError as error:
            raise DataError(
                f"{uri}, line {number}: {line[:80]!r} is not an item: {error}; unpack the archive again"
            ) from error
        titles.append(title)
        genres.append([kind for kind in kinds if kind != "(no genres listed)"])
    years = [re.search(r"\((\d{4})\)\s*$", title) for title in titles]
    table = pa.table(
        {
            "item": pa.array(keys, pa.int64()),
            "title": pa.array(titles, pa.string()),
            "year": pa.array([int(found[1]) if found else None for found in years], pa.int64()),
            "genres": pa.array(genres, pa.list_(pa.string())),
        }
    )
    return base.keyed_table(table, "item", "item", uri)


def _users(uri: str, form: _Format) -> pa.Table:
    """Columns user, gender, age, occupation, zip."""
    split = [line.split("|" if form.ratings == "u.data" else "::") for line in _lines(uri, form)]
    bad = [fields for fields in split if len(fields) != 5]
    if bad:
        raise DataError(f"{uri}: {bad[0]} is not a user: five fields are needed; unpack the archive again")
    # u.user: id, age, gender, occupation, zip; users.dat: id, gender, age, occupation, zip.
    key, second, third, occupation, code = (list(column) for column in zip(*split, strict=True))
    age, gender = (second, third) if form.ratings == "u.data" else (third, second)
    table = pa.table(
        {
            "user": pa.array([int(k) for k in key], pa.int64()),
            "gender": gender,
            "age": pa.array([int(a) for a in age], pa.int64()),
            "occupation": occupation,
            "zip": code,
        }
    )
    return base.keyed_table(table, "user", "user", uri)
