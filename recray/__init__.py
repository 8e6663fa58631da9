"""recray: recommender training from Parquet click logs to an evaluated index, on Ray.

    import recray

    config = recray.load_config("my.toml", ["training.epochs=5"])
    report = recray.run(config)             # all stages, or one by one:
    dataset = recray.prepare(config)        # raw events -> ids, splits, histories, shards
    checkpoint = recray.train(config)       # -> the best epoch on validation
    index = recray.index(config)            # item vectors -> faiss
    report = recray.evaluate(config)        # -> metrics of model, index and baselines on the test split
    report.metrics["model"]["ndcg@10"].value

Every stage returns a record and is skipped if it is up to date; `recray.Run(config)` finds its artefacts. `recray.tune`
searches hyperparameters, `recray.recommend` writes every user's list, and `recray.load("runs/news")` answers in Python
with raw keys. Errors that recray raises on purpose extend `recray.RecrayError`; the library prints nothing and logs to
`logging.getLogger("recray")`. Every key of the configuration: `recray keys` on the command line.

Importing recray loads neither Ray, torch nor faiss: a name is loaded when it is first used. It sets GOMP_SPINCOUNT unless
that is set (recray.cluster.cpus).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from recray.cluster.cpus import bound_spinning

bound_spinning()

__version__ = "0.1.0"

if TYPE_CHECKING:
    from recray.artifacts import Run
    from recray.config import Config, load_config, parse_config
    from recray.data.infer import infer
    from recray.data.prepare import prepare
    from recray.errors import (
        ClusterError,
        ConfigError,
        DataError,
        DependencyError,
        LineageError,
        RecrayError,
        ResourceError,
        StorageError,
    )
    from recray.evaluation import evaluate
    from recray.evaluation.promote import promote, rollback
    from recray.evaluation.recommend import recommend
    from recray.inference import load
    from recray.records import CheckpointRecord, DatasetRecord, IndexRecord, ReportRecord, TuneRecord
    from recray.report.text import render
    from recray.retrieval.build import index
    from recray.stages import run
    from recray.training.checkpoint import load_model
    from recray.training.launch import train
    from recray.tuning.study import tune
    from recray.verification import verify

__all__ = [
    "CheckpointRecord",
    "ClusterError",
    "Config",
    "ConfigError",
    "DataError",
    "DatasetRecord",
    "DependencyError",
    "IndexRecord",
    "LineageError",
    "RecrayError",
    "ReportRecord",
    "ResourceError",
    "Run",
    "StorageError",
    "TuneRecord",
    "evaluate",
    "index",
    "infer",
    "load",
    "load_config",
    "load_model",
    "parse_config",
    "prepare",
    "promote",
    "recommend",
    "render",
    "rollback",
    "run",
    "train",
    "tune",
    "verify",
]

# Module -> public names that are loaded from it.
_MODULES = {
    "recray.artifacts": ("Run",),
    "recray.config": ("Config", "load_config", "parse_config"),
    "recray.data.infer": ("infer",),
    "recray.data.prepare": ("prepare",),
    "recray.errors": tuple(name for name in __all__ if name.endswith("Error")),
    "recray.evaluation": ("evaluate",),
    "recray.evaluation.promote": ("promote", "rollback"),
    "recray.evaluation.recommend": ("recommend",),
    "recray.inference": ("load",),
    "recray.records": tuple(name for name in __all__ if name.endswith("Record")),
    "recray.report.text": ("render",),
    "recray.retrieval.build": ("index",),
    "recray.stages": ("run",),
    "recray.training.checkpoint": ("load_model",),
    "recray.training.launch": ("train",),
    "recray.tuning.study": ("tune",),
    "recray.verification": ("verify",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'recray' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
