"""The `recray` command: one verb per stage, the same functions as `import recray`.

A module for each group of verbs; importing one registers them with the application, and `recray --help` lists
them in the order of these imports.
"""

from recray.cli import data, stages, products, runs, system  # isort: skip
from recray.cli.application import app, main

__all__ = ["app", "data", "main", "products", "runs", "stages", "system"]
