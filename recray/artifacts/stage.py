"""What decides the result of each stage: its configuration keys, and the identity that they give an artefact.

Every key of the configuration is claimed by a stage or listed in NO_RESULT.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from recray import registry
from recray.config import Config
from recray.metrics import parse
from recray.records import CheckpointRecord, DatasetRecord, IndexRecord, Record, ReportRecord, TuneRecord

R = TypeVar("R", bound=Record, covariant=True)


Split = Literal["test", "valid"]


# Keys that came later: unset, they leave identities as they were.
_ADDED = ("evaluation.max_queries", "training.max_valid_queries")


@dataclass(frozen=True)
class Stage(Generic[R]):
    """What a stage is called and which configuration keys decide its result.

    keys, except: dotted keys or sections of the configuration. Every key of the configuration is claimed by a stage or
    listed in NO_RESULT.
    """

    name: str  # folder below the run, and key in current.json
    verb: str  # the command that makes it
    record: type[R]
    keys: tuple[str, ...]
    excluded: tuple[str, ...] = ()
    version: int = 1  # of the files that it writes: those of an older one are not up to date

    def values(self, config: Config) -> dict[str, Any]:
        """Dotted key -> value, of the keys that decide this stage's result."""
        flat = flatten(config.model_dump(mode="json"))
        kept = {
            key: value for key, value in flat.items() if is_below(key, self.keys) and not is_below(key, self.excluded)
        }
        if self.name in ("checkpoint", "tune") and config.model.family == "ranker":
            # They define how lists are ranked, and a ranker is selected by how it predicts clicks.
            kept = {key: value for key, value in kept.items() if not is_below(key, ("evaluation",))}
        kept = {key: value for key, value in kept.items() if key not in _ADDED or value is not None}
        return kept | _plugin_files(config, kept)


def _plugin_files(config: Config, values: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of the files of plug-ins outside the package that these keys name: an edited model is another model."""
    found = {}
    for key, kind in _PLUGINS.items():
        given = values.get(key, [])
        for name in given if isinstance(given, list) else [given]:
            name = parse(name)[0] if kind == "metric" else name
            if (digest := registry.file_hash(kind, name, config.run.plugins)) is not None:
                found[f"{key}: file of {name}"] = digest
    return found


# Keys whose values name plug-ins.
_PLUGINS: dict[str, registry.Kind] = {
    "data.source": "source",
    "model.name": "model",
    "loss.name": "loss",
    "training.metric": "metric",
    "evaluation.metrics": "metric",
    "evaluation.baselines": "baseline",
}
DATASET = Stage("dataset", "prepare", DatasetRecord, ("data", "run.seed"), version=2)
CHECKPOINT = Stage(
    "checkpoint",
    "train",
    CheckpointRecord,
    # Selection ranks validation users as evaluation does.
    ("model", "loss", "optim", "training", "run.seed", "evaluation.filter_seen", "evaluation.queries"),
    excluded=("loss.chunk_size", "training.resume", "training.compile", "training.save_every"),
)
INDEX = Stage(
    "index",
    "index",
    IndexRecord,
    ("retrieval", "evaluation.queries", "run.seed"),
    # The order of what the index finds is decided after it.
    excluded=("retrieval.ranker", "retrieval.item_knn_weight"),
)
_REPORT_KEYS = ("evaluation", "retrieval.ranker", "retrieval.item_knn_weight", "retrieval.k", "run.seed")
REPORT = Stage("report", "evaluate", ReportRecord, _REPORT_KEYS, excluded=("evaluation.batch_size",))
REPORT_VALID = Stage("report-valid", "evaluate", ReportRecord, _REPORT_KEYS, excluded=("evaluation.batch_size",))
# How much of a search is done, how much of it at a time, and what is done with the best may change when it is resumed.
_TUNE_FREE = tuple(
    f"tune.{key}"
    for key in ("trials", "seconds", "epochs", "concurrent", "cpus_per_trial", "gpus_per_trial", "top", "seeds")
)
TUNE = Stage(
    "tune",
    "tune",
    TuneRecord,
    ("tune", *CHECKPOINT.keys),
    # Trials only select: the winner's own run refits.
    excluded=(*_TUNE_FREE, *CHECKPOINT.excluded, "training.refit"),
)
STAGES: tuple[Stage[Record], ...] = (DATASET, CHECKPOINT, INDEX, REPORT, REPORT_VALID, TUNE)


def report_stage(split: str) -> Stage[ReportRecord]:
    """The stage of the report on a split, "test" or "valid"."""
    return REPORT if split == "test" else REPORT_VALID


# Keys that change where and how fast work is done, never its result.
NO_RESULT = (
    "run.name",
    "run.output",
    "run.dataset",
    "run.keep",
    "run.plugins",
    "scaling",
    "loss.chunk_size",
    "training.resume",
    "training.compile",
    "training.save_every",
    "evaluation.batch_size",
    "promotion",
    "report",
    "tracking",
    *_TUNE_FREE,
)


def identity_of(keys: Mapping[str, Any], inputs: Sequence[str], version: int = 1) -> str:
    """Eight hex digits of SHA-256; `Run.artifact` checks the whole keys, so that a collision cannot pass unnoticed."""
    decides = {"keys": dict(keys), "inputs": list(inputs)} | ({"version": version} if version > 1 else {})
    body = json.dumps(decides, sort_keys=True)
    return hashlib.sha256(body.encode()).hexdigest()[:8]


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"dim": 8}} -> {"model.dim": 8}. Lists are values; an empty table is the value {}."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        key = f"{prefix}{name}"
        flat |= flatten(value, f"{key}.") if isinstance(value, dict) and value else {key: value}
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any], most: int = 4) -> str:
    """'model.dim 64 -> 8, optim.name adamw -> sgd'; empty where nothing differs."""
    keys = changed(old, new)
    shown = [f"{key} {_short(old.get(key))} -> {_short(new.get(key))}" for key in keys[:most]]
    return ", ".join(shown) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def is_below(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
