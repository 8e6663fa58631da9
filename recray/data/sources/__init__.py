"""Where events come from, one module per kind of log."""

from __future__ import annotations

from recray import registry
from recray.config import Config


def check(config: Config) -> None:
    """Look at the log without reading it, and before Ray is started: a wrong column is an error at once.

    A source may define `check(config: DataConfig)`, which raises what its `read` would.
    """
    module = registry.load("source", config.data.source, config.run.plugins)
    if hasattr(module, "check"):
        module.check(config.data)
