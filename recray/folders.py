"""Folders: what is in them, and deleting what recray wrote there."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterable
from stat import S_ISREG
from types import EllipsisType

import pyarrow.fs as pafs

from recray.errors import StorageError
from recray.storage import errors_at, join, local_path, resolve

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)
MARK = "identity.json"  # in every artefact's folder


def walk(folder: str, enter: Callable[[str], bool]) -> tuple[list[tuple[str, int, str]], list[str]]:
    """All files below a folder as (path inside it, bytes, path without links), and the links that lead back to a folder above.

    Links are followed. enter: whether to look into a folder, by its path inside `folder`; for local folders.
    """
    system, path = resolve(folder)
    with errors_at(folder, "listed"):
        if isinstance(system, pafs.LocalFileSystem):
            return _walk_local(path, enter)
        found = system.get_file_info(pafs.FileSelector(path, recursive=True))
    prefix = path.rstrip("/") + "/"
    files = [entry for entry in found if entry.type == pafs.FileType.File]
    return [(one.path.removeprefix(prefix), one.size, join(folder, one.path.removeprefix(prefix))) for one in files], []


def _walk_local(root: str, enter: Callable[[str], bool]) -> tuple[list[tuple[str, int, str]], list[str]]:
    files: list[tuple[str, int, str]] = []
    links_back: list[str] = []
    to_list: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(root),))]  # and the real paths that lead there
    while to_list:
        inside, above = to_list.pop()
        with os.scandir(os.path.join(root, inside)) as entries:
            for entry in entries:
                name = os.path.join(inside, entry.name)
                linked = entry.is_symlink()
                real = os.path.realpath(entry.path) if linked else os.path.join(above[-1], entry.name)
                if not entry.is_dir():
                    # A broken link is a file, so that reading it fails and names it.
                    size = entry.stat().st_size if not linked or os.path.exists(real) else 0
                    files.append((name, size, real))
                elif linked and any(f"{one}/".startswith(f"{real.rstrip('/')}/") for one in above):
                    links_back.append(name)
                elif enter(name):
                    to_list.append((name, (*above, real)))
    return files, links_back


def size(uri: str) -> int:
    """Bytes of all files below a folder."""
    system, path = resolve(uri)
    with errors_at(uri, "listed"):
        return sum(entry.size or 0 for entry in system.get_file_info(pafs.FileSelector(path, recursive=True)))


def contents(folder: str, names: Iterable[str]) -> dict[str, int | EllipsisType]:
    """Of these paths below a folder those that exist, with the bytes of a file; `...` for a folder or a link."""
    system, path = resolve(folder)
    with errors_at(folder, "listed"):
        if not isinstance(system, pafs.LocalFileSystem):
            found = system.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
            prefix = path.rstrip("/") + "/"
            return {one.path.removeprefix(prefix): one.size for one in found if one.type == pafs.FileType.File}
        present: dict[str, int | EllipsisType] = {}
        above = {name.rpartition("/")[0] for name in names}
        linked = {one for one in above if _leads_through_a_link(path, one)}
        for name in names:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                stat = os.lstat(os.path.join(path, name))
                plain = S_ISREG(stat.st_mode) and name.rpartition("/")[0] not in linked
                present[name] = stat.st_size if plain else ...
        return present


def _leads_through_a_link(root: str, inside: str) -> bool:
    parts = inside.split("/") if inside else []
    return any(os.path.islink(os.path.join(root, *parts[: depth + 1])) for depth in range(len(parts)))


def everything(folder: str) -> list[str]:
    """What is below a folder, at every depth: files as paths inside it, folders with a trailing `/`, links with `@`, which
    are not followed. Empty where there is no such folder."""
    system, path = resolve(folder)
    with errors_at(folder, "listed"):
        if not isinstance(system, pafs.LocalFileSystem):
            found = system.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
            prefix = path.rstrip("/") + "/"
            return [one.path.removeprefix(prefix) for one in found if one.type == pafs.FileType.File]
        names = []
        for root, folders, files in os.walk(path):
            for name in (*folders, *files):
                whole = os.path.join(root, name)
                mark = "@" if os.path.islink(whole) else "/" if os.path.isdir(whole) else ""
                names.append(os.path.relpath(whole, path) + mark)
        return names


def delete_written(folder: str, written: re.Pattern[str]) -> list[str]:
    """Delete what recray wrote below a folder: those names of `everything` that `written` matches, and the folder if it is
    then empty. Returns the names that stay. Raises StorageError if the folder is a link."""
    system, path = resolve(folder)
    local = isinstance(system, pafs.LocalFileSystem)
    if local and os.path.islink(path):
        raise StorageError(f"{folder} is a link: recray deletes only in folders that it made; delete the link yourself")
    names = everything(folder)
    stay = [name for name in names if not written.fullmatch(name)]
    with errors_at(folder, "deleted"):
        if not local and not stay:
            system.delete_dir(path)
            return []
        for name in sorted(set(names) - set(stay), key=_order):
            whole = join(path, name.rstrip("@")) if local else f"{path}/{name}"
            with contextlib.suppress(FileNotFoundError):
                if name.endswith("/"):
                    with contextlib.suppress(OSError):  # not empty: something of the user's is in it
                        os.rmdir(whole)
                else:
                    system.delete_file(whole)
        if local:
            with contextlib.suppress(OSError):
                os.rmdir(path)
    return stay


def put_in_place(new: str, folder: str) -> None:
    """Rename the local folder `new`, a neighbour, to `folder`; what `folder` held before is then at `new`. One step where
    the system can exchange two names (Linux), else two, between which there is no `folder`."""
    source, target = local_path(new), local_path(folder)
    with errors_at(folder, "written"):
        if not os.path.isdir(target):
            os.rename(source, target)
        elif not _exchange(source, target):
            aside = f"{target}.old"
            os.rename(target, aside)
            os.rename(source, target)
            os.rename(aside, source)


def _exchange(a: str, b: str) -> bool:
    """Whether the names of two folders could be exchanged."""
    call = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return call is not None and call(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE) == 0


def _order(name: str) -> tuple[int, int, str]:
    """The record first, so that what is half deleted is not complete; then files before their folders; the mark last."""
    if "/" not in name and name.endswith(".json"):
        return (2, 0, name) if name == MARK else (0, 0, name)
    return 1, -len(name), name
