"""Which files a location means: a file, a folder, a glob, or a list of these, as Spark, DuckDB and pyarrow.dataset read them.

- What exists is taken by its name, before any of its characters is read as a pattern.
- A folder means the files below it that end in .parquet, .parq or .pq, in any case.
- A glob decides by itself: `*`, `?`, `[ab]`, `{a,b}` inside one name, `**` any number of folders. A folder that it names
  is read as a folder.
- Names that begin with `_` or `.` are hidden, except partitions such as `_day=1`, and those that a pattern spells out.
- A file is read once, however often it is named, and whatever links lead to it.
- Artefacts of recray below the location are left out. Tables of Delta Lake, Iceberg and Hudi are refused, since their
  folders hold files of removed versions, too.

What is left out is counted and named in one message.
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from recray import folders, log, storage
from recray.errors import DataError, StorageError
from recray.storage import FileInfo

_ENDINGS = (".parquet", ".parq", ".pq")
_MAGIC = "*?[{"
_NAMED = 3  # files named in a message
_HIDDEN = "hidden (names that begin with '_' or '.')"
_ENDING = "that end neither in .parquet nor in .parq or .pq (a glob that names them reads them)"
_OWN = "written by recray"
_TWICE = "listed twice (read once)"
_BACK = "links that lead back to a folder above them"
_MARKS = {"_delta_log": "Delta Lake", ".hoodie": "Hudi", "metadata": "Iceberg"}
_EXPORT = {
    "Delta Lake": "pyarrow.dataset.write_dataset(deltalake.DeltaTable(URI).to_pyarrow_dataset(), OUT, format='parquet')",
    "Iceberg": "pyarrow.parquet.write_table(catalog.load_table(NAME).scan().to_arrow(), OUT) with pyiceberg",
    "Hudi": "spark.read.format('hudi').load(URI).write.parquet(OUT)",
}


@dataclass
class _Found:
    files: list[FileInfo] = field(default_factory=list)
    real: set[str] = field(default_factory=set)  # paths without links, of the files taken
    skipped: dict[str, list[str]] = field(default_factory=dict)  # why -> URIs

    def take(self, uri: str, size: int, real: str) -> None:
        if real in self.real:
            self.skip(_TWICE, uri)
        else:
            self.real.add(real)
            self.files.append(FileInfo(uri, size))

    def skip(self, why: str, uri: str) -> None:
        self.skipped.setdefault(why, []).append(uri)

    def __str__(self) -> str:
        """'2 hidden (...): _SUCCESS, x.crc; 1 listed twice (read once): a.parquet'."""
        parts = []
        for why, uris in self.skipped.items():
            names = ", ".join(uri.rpartition("/")[2] for uri in uris[:_NAMED])
            parts.append(f"{len(uris):,} {why}: {names}{', ...' if len(uris) > _NAMED else ''}")
        return "; ".join(parts)


def find(location: str | Sequence[str], stage: str = "prepare") -> list[FileInfo]:
    """The files that a location means: local ones by absolute path; those of a folder or glob in order of their paths.

    Logs what was left out. Raises StorageError if nothing is found, DataError for a table of Delta Lake, Iceberg or Hudi.
    """
    found = _Found()
    for one in [location] if isinstance(location, str) else location:
        before = len(found.files) + len(found.skipped.get(_TWICE, []))
        _find(one, found)
        if len(found.files) + len(found.skipped.get(_TWICE, [])) == before:
            left = f" (there are {found})" if found.skipped else ""
            raise StorageError(f"no '*.parquet' files in {one}{left}: check the path")
    if found.skipped:
        # Spark's markers and checksums lie in most folders; anything else may be a part of the log.
        say = log.info if set(found.skipped) == {_HIDDEN} else log.warning
        counts = {why: len(uris) for why, uris in found.skipped.items()}
        say(stage, f"files that are not read: {found}", event="files_skipped", values=counts)
    return found.files


def _find(location: str, found: _Found) -> None:
    base, pattern = _base(location)
    kind, size = storage.look(base)
    if kind == "file" and not pattern:
        found.take(base, size, storage.real_path(base))
        return
    if kind != "folder":
        raise StorageError(f"{location} does not exist: give a Parquet file, a folder, a glob or a list of them")
    glob = _Glob(tuple(pattern))
    entries, links_back = folders.walk(base, glob.may_enter)
    for path in sorted(links_back):
        found.skip(_BACK, storage.join(base, path))
    entries.sort(key=lambda entry: storage.join(base, entry[0]))
    paths = [path for path, _, _ in entries]
    own, tables = _own_folders(base, paths), _tables(base, paths)
    for path, size, real in entries:
        uri = storage.join(base, path)
        match = glob.match(path)
        if match == "no":
            continue
        if any(path.startswith(folder) for folder in own):
            if path.endswith(".parquet"):  # the records next to them are no part of a log in any case
                found.skip(_OWN, uri)
        elif any(glob.hides(part) for part in path.split("/")):
            found.skip(_HIDDEN, uri)
        elif match == "below" and not path.lower().endswith(_ENDINGS):
            found.skip(_ENDING, uri)
        else:
            _refuse(next(((root, name) for root, name in tables if path.startswith(root)), None), base)
            found.take(uri, size, real)


def _base(location: str) -> tuple[str, list[str]]:
    """The folder to search and the parts of the pattern of paths inside it; no pattern for what exists by its name."""
    remote = "://" in location and not location.startswith("file:")
    absolute = (location if remote else storage.local_path(location)).rstrip("/") or "/"
    if not any(mark in absolute for mark in _MAGIC) or storage.look(absolute)[0] != "nothing":
        return absolute, []
    parts = absolute.split("/")
    first = next(i for i, part in enumerate(parts) if any(mark in part for mark in _MAGIC))
    return "/".join(parts[:first]) or "/", parts[first:]


@dataclass(frozen=True)
class _Glob:
    """A pattern of paths, one part for each name; without parts it is the folder itself."""

    parts: tuple[str, ...]

    def match(self, path: str) -> Literal["named", "below", "no"]:
        """Whether the pattern names this file, or a folder above it."""
        *above, last = self._used(path.split("/"))
        # A pattern that ends with ** names folders.
        if len(self.parts) in last and self.parts[-1:] not in ((), ("**",)):
            return "named"
        return "below" if any(len(self.parts) in used for used in above) else "no"

    def may_enter(self, folder: str) -> bool:
        """Whether files below this folder can match. Folders that tell a table format are always looked into."""
        names = folder.split("/")
        *above, last = self._used(names)
        return names[-1] in _MARKS or bool(last) or any(len(self.parts) in used for used in above)

    def hides(self, name: str) -> bool:
        if name.endswith(("_$folder$", "._COPYING_")):  # Hadoop's
            return True
        if not name.startswith(".") and not (name.startswith("_") and "=" not in name):
            return False
        return not any(part.startswith(name[0]) and _fits(name, part) for part in self.parts)

    def _used(self, names: list[str]) -> list[set[int]]:
        """How many parts of the pattern the first 0, 1, ... of these names can have used up."""
        used = [self._after_stars({0})]
        for name in names:
            stars = {i for i in used[-1] if self.parts[i : i + 1] == ("**",)}
            next_parts = {i + 1 for i in used[-1] - stars if i < len(self.parts) and _fits(name, self.parts[i])}
            used.append(self._after_stars(stars | next_parts))
        return used

    def _after_stars(self, places: set[int]) -> set[int]:
        """`**` stands for no folder, too."""
        while more := {i + 1 for i in places if self.parts[i : i + 1] == ("**",)} - places:
            places = places | more
        return places


def _fits(name: str, part: str) -> bool:
    """Whether a name matches a part of a pattern: shell wildcards, and alternatives in braces as Spark has them."""
    return any(fnmatch.fnmatchcase(name, one.replace("[^", "[!")) for one in _alternatives(part))


@cache
def _alternatives(part: str) -> list[str]:
    braces = re.search(r"\{([^{}]*)\}", part)
    if braces is None:
        return [part]
    head, tail = part[: braces.start()], part[braces.end() :]
    return [whole for option in braces[1].split(",") for whole in _alternatives(f"{head}{option}{tail}")]


def _own_folders(base: str, paths: list[str]) -> list[str]:
    """The folders of artefacts and lists of recray among these paths, with a slash at the end."""
    own = []
    for path in paths:
        folder, _, name = path.rpartition("/")
        prefix = f"{folder}/" if folder else ""
        if name == "_lists.json" and folder:
            own.append(prefix)
        elif name == "identity.json":
            with contextlib.suppress(StorageError):  # a file that recray did not write
                body = storage.read_json(storage.join(base, path))
                if isinstance(body, dict) and {"stage", "identity", "keys", "inputs"} <= body.keys():
                    own.append(prefix)
    return own


def _tables(base: str, paths: list[str]) -> list[tuple[str, str]]:
    """(folder inside the base with a slash at the end, format) of tables whose files cannot be read one by one."""
    found = []
    for path in paths:
        parts = path.split("/")
        for mark, table in _MARKS.items():
            if mark in parts[:-1] and (table != "Iceberg" or parts[-1].endswith("metadata.json")):
                found.append(("".join(f"{part}/" for part in parts[: parts.index(mark)]), table))
    return list(dict.fromkeys(found)) + _table_above(base)


def _table_above(base: str) -> list[tuple[str, str]]:
    """The table of which the base is a partition or the folder of data."""
    head, _, name = base.rpartition("/")
    while "=" in name or name == "data":
        for mark, table in _MARKS.items():
            if storage.look(storage.join(head, mark))[0] == "folder" and (
                table != "Iceberg" or storage.list_files(storage.join(head, mark), "metadata.json")
            ):
                return [("", table)]
        head, _, name = head.rpartition("/")
    return []


def _refuse(table: tuple[str, str] | None, base: str) -> None:
    if table is not None:
        raise DataError(
            f"{storage.join(base, table[0])} is a table of {table[1]}: its folder holds files of removed versions, too, so that "
            f"reading all files is wrong; export the current version and give its path: {_EXPORT[table[1]]}"
        )
