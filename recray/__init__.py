"""recray: recommender training from Parquet click logs to an evaluated index, on Ray.

    import recray
    config = recray.load_config("my.toml")
    dataset = recray.prepare(config)
    checkpoint = recray.train(config)
    index = recray.index(config)
    report = recray.evaluate(config)

or all of them: `report = recray.run(config)`. Importing recray imports neither Ray, torch nor faiss: a name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Config": "recray.config",
    "load_config": "recray.config",
    "prepare": "recray.data.prepare",
    "train": "recray.training.launch",
    "tune": "recray.tuning.study",
    "index": "recray.retrieval.build",
    "evaluate": "recray.evaluation",
    "recommend": "recray.evaluation.recommend",
    "run": "recray.stages",
    "Run": "recray.artifacts",
    "RecrayError": "recray.errors",
}
__all__ = [
    "Config",
    "RecrayError",
    "Run",
    "evaluate",
    "index",
    "load_config",
    "prepare",
    "recommend",
    "run",
    "train",
    "tune",
]

if TYPE_CHECKING:
    from recray.artifacts import Run
    from recray.config import Config, load_config
    from recray.data.prepare import prepare
    from recray.errors import RecrayError
    from recray.evaluation import evaluate
    from recray.evaluation.recommend import recommend
    from recray.retrieval.build import index
    from recray.stages import run
    from recray.training.launch import train
    from recray.tuning.study import tune


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'recray' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
