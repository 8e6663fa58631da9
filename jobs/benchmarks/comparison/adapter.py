"""All that is known of how two checkouts differ: names of code, keys and results, and where results lie.

When a module, a key or a folder moves, this is the file to change. Results are read from files, not through `recray`,
for records of one checkout are none of the other's.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Where the class is whose `step(loss, ...)` is called once after every optimizer step.
PROGRESS = (
    ("recray.training.progress", "Progress"),
    ("recray.training.console", "Progress"),
    ("recray.training.console", "Console"),
)

# Keys of the configuration by their name at the base -> a later name, which is used where the old one is refused.
KEYS = {
    "retrieval.filter_weight": "retrieval.item_knn_weight",
}

# The same of a value, or of values in a list.
VALUES = {
    "evaluation.baselines": {"item_filter": "item_knn"},
}

# Names in results, e.g. of the systems of a report: the base's -> later ones.
NAMES = {"item_filter": "item_knn"}

# Not compared: what depends on the clock or the machine, on where files lie, or on how things are identified.
EXCLUDED = frozenset(
    (
        *("id", "identity", "keys", "created", "recray_version", "parents", "config", "fingerprint"),
        *("dataset_uri", "checkpoint_uri", "bytes"),  # of an index whose file is compared
        *("seconds", "build_seconds", "validation_seconds", "read_seconds", "cut_seconds", "copy_seconds"),
        *("first_batch_seconds", "first_step_at", "events_per_second", "waiting_share"),
        *("milliseconds", "search_milliseconds", "rank_milliseconds"),
    )
)

# Folders of a run that a stage's results may lie in or below, and names of the stage's record, the base's first.
_FOLDERS = {"report-test": ("report", "report-test"), "report-valid": ("report-valid", "report")}
_RECORDS = {"report-test": ("report.json",), "report-valid": ("report.json",)}
# Of records in the same folder, the one with these values is meant.
_WITH = {"report-test": {"split": "test"}, "report-valid": {"split": "valid"}}


def artifact(run_folder: Path, stage: str) -> tuple[Path, dict[str, Any]]:
    """The folder that holds a stage's results, and its record. Raises LookupError where there is none, or are several.

    The base writes <run>/<stage>/<record>. Else the folder below <run>/<stage> is taken that <run>/current.json,
    <run>/<stage>/current.json or the link <run>/<stage>/current names; else the only one that has a record.
    """
    seen = []
    for name in _FOLDERS.get(stage, (stage,)):
        root = run_folder / name
        named = [*_named(run_folder / "current.json", name), *_named(root / "current.json", None)]
        for folder in (root, *(root / one for one in named), root / "current"):
            record = _record(folder, stage)
            if record is not None:
                return folder.resolve(), record
        below = [folder for folder in sorted(root.glob("*")) if folder.is_dir() and _record(folder, stage) is not None]
        if len(below) == 1:
            return below[0], _record(below[0], stage) or {}
        seen += [str(folder) for folder in below]
    raise LookupError(
        f"{run_folder} has no single result of {stage}: found {', '.join(seen) or 'none'}; say in "
        f"jobs/benchmarks/comparison/adapter.py where it lies now"
    )


def _record(folder: Path, stage: str) -> dict[str, Any] | None:
    for name in _RECORDS.get(stage, (f"{stage}.json",)):
        if (folder / name).is_file():
            record = json.loads((folder / name).read_text())
            if all(record.get(key) == value for key, value in _WITH.get(stage, {}).items()):
                return dict(record)
    return None


def _named(file: Path, key: str | None) -> list[str]:
    """What a file of pointers names under a key, or all that it names."""
    if not file.is_file():
        return []
    body = json.loads(file.read_text())
    texts = [body] if isinstance(body, str) else body.values() if key is None else [body.get(key)]
    return [text for text in texts if isinstance(text, str) and text]


def renamed(value: Any) -> Any:
    """A result with names as they are now."""
    if isinstance(value, Mapping):
        return {NAMES.get(key, key): renamed(one) for key, one in value.items()}
    return value


def _named_table(name: str, folder: Path) -> str:
    """Tables were called by their feature, with those of ids among them; later they have numbers, in the order of features."""
    if found := re.search(r"\b(user|item)\.ids\.weight$", name):
        return f"{name[: found.start()]}{found[1]}.tables.{found[1]}.weight"
    found = re.search(r"\b(user|context|item)(_features)?\.tables\.(\d+)\.weight$", name)
    if not found:
        return name
    features = json.loads((folder / "dataset.json").read_text())["features"]
    of_role = [f["name"] for f in features if f["role"] == found[1] and f["kind"] != "numeric"]
    return f"{name[: found.start(3)]}{of_role[int(found[3])]}.weight"


def weights(folder: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint by its name; one of a table in pieces by name and piece. Folders below hold epochs."""
    from safetensors.numpy import load_file

    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        _, of, pieces = file.stem.rpartition("-of-")
        piece = f" (piece {file.stem.split('-')[-3]} of {pieces})" if of else ""
        for name, tensor in load_file(file).items():
            # Tables of features by name: a name such as `type` had collided with an attribute of their container.
            name = re.sub(r"(\.tables\.\w+?)_\.weight$", r"\1.weight", NAMES.get(name, name))
            name = _named_table(name, folder)
            key = f"{name}{piece}"
            if key in found:
                raise LookupError(f"{folder} holds two tensors '{key}'")
            found[key] = tensor
    return found
