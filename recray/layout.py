"""Names of the files that recray writes, by stage: what it may delete. Anything else in its folders is the user's.

The names are those of `folders.everything`: folders end with `/`, links with `@`.
"""

from __future__ import annotations

import re

from recray import folders, log, storage
from recray.errors import StorageError

SCORES = "scores.parquet"  # of a report: recray.evaluation.scores
PRUNED = "pruned"  # below a run: records of what was deleted, each in a folder named by its id
_PRUNED_FOLDER = re.compile(rf"(.*/)?{PRUNED}/[a-z]+-[0-9a-f]{{12}}")
_SHARD = r"part-\d+\.parquet"
_SAVED = (
    r"(checkpoint|dataset|digests-\d+)\.json|(model|items)\.safetensors|state\.pt"
    r"|tables(-state)?-\d+-of-\d+\.safetensors"
)


def _pattern(*names: str) -> re.Pattern[str]:
    """Any of these, or one that a killed process was writing."""
    return re.compile(rf"({'|'.join(names)}|identity\.json)(\.[0-9a-f]{{8}}\.part)?")


def _below(folder: str, *names: str) -> str:
    """A folder, and what is in it."""
    return rf"{folder}/({'|'.join(names)})?"


_EPOCHS = _below(r"epoch-\d+(-step-\d+)?", _SAVED)
# What Ray Train leaves in its folder.
_RAY = _below("ray", r"\.validate_storage_marker", r"checkpoint_manager_snapshot\.json", r"checkpoint_0[^/]*(/.*)?")
_CHECKPOINT = "|".join(
    (
        _SAVED,
        "stop",
        r"stalled-\d+",
        r"workers\.lock",
        _below("epochs", _EPOCHS),
        _below("refit", _below(r"of-\d+", _EPOCHS)),
        _RAY,
    )
)
_IDENTITY = "[0-9a-f]{8}"
_TRIAL = (
    r"(point|trial|current)\.json",
    _below("checkpoint", "current@", rf"{_IDENTITY}\.lock", _below(_IDENTITY, r"identity\.json", _CHECKPOINT)),
)

NOTHING = _pattern()  # but the mark itself, half written
EPOCH = _pattern(_SAVED)
EPOCHS = _pattern(_EPOCHS)
SWEEP = _pattern(_below(r"sweep-\d+", ".*"))  # Ray Tune's folder, made anew by every start
SORTED = _pattern(r"bucket-\d+\.parquet")
LISTS = _pattern(r"part-(\d+|popular)\.parquet", r"_lists\.json", r"_begun\.json")
BUNDLE = _pattern(
    r"(manifest|features|test|_begun)\.json",
    r"(query|item|ranker)\.pt2",
    r"(items|users|catalog)\.parquet",
    r"(score|encoding)\.py",
    _below("index", r"index\.faiss", r"(ids|vectors|recent)\.parquet", r"index\.json"),
    _below("__pycache__", r"(score|encoding)\..*\.pyc"),  # left by running score.py
)
WRITTEN = {
    "dataset": _pattern(
        r"dataset\.json",
        r"items\.parquet",
        _below(r"(users|train|valid|test|early-(train|valid|test))", _SHARD),
        _below("(_sorted|events)", r"bucket-\d+\.parquet"),
    ),
    "checkpoint": _pattern(_CHECKPOINT),
    "index": _pattern(r"index\.faiss", r"(ids|vectors|recent)\.parquet", r"index\.json"),
    "report": _pattern(r"report\.(json|html)", r"scores\.parquet"),
    "report-valid": _pattern(r"report\.(json|html)", r"scores\.parquet"),
    "tune": _pattern(
        r"tune\.(json|html)",
        r"best\.toml",
        _below("ray", _below(r"sweep-\d+", ".*")),
        _below("(trials|seeds)", _below(r"\d+(-\d+)?", *_TRIAL)),
    ),
}


def is_pruned(folder: str) -> bool:
    """Whether only the record of an artefact is left in a folder, which `recray prune` wrote."""
    return _PRUNED_FOLDER.fullmatch(folder) is not None


def clear(folder: str, written: re.Pattern[str]) -> list[str]:
    """Delete what recray wrote in a folder, and the folder if nothing else is in it. Returns, and warns of, what stays."""
    stay = folders.delete_written(folder, written)
    if stay:
        log.warning("storage", f"{folder} keeps {_listed(stay)}, which recray did not write", event="kept")
    return stay


def clear_half_written(folder: str, written: re.Pattern[str]) -> None:
    """Delete the files in a local folder that a killed process was writing; an object store has none."""
    for name in folders.everything(folder) if "://" not in folder else ():
        if name.endswith(".part") and written.fullmatch(name):
            storage.delete_file(storage.join(folder, name))


def refuse_foreign(folder: str, written: re.Pattern[str]) -> None:
    """Raise StorageError if something that recray did not write lies in a folder."""
    found = [name for name in folders.everything(folder) if not written.fullmatch(name)]
    if found:
        raise StorageError(
            f"{folder} holds {_listed(found)}, which recray did not write: move it elsewhere, or choose another folder"
        )


def _listed(names: list[str], most: int = 3) -> str:
    shown = ", ".join(name.rstrip("@") for name in sorted(names)[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
