"""Small configurations on the simulated source, and the shipped ones."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from recray.config import Config, load_config

REPOSITORY = Path(__file__).parents[2]
SHIPPED = sorted((REPOSITORY / "jobs" / "configs").glob("*.toml"))


def simulated_table(
    folder: Path | str,
    name: str = "small",
    *,
    events: int = 10_000,
    users: int = 300,
    items: int = 200,
    data: dict[str, Any] | None = None,
    **sections: dict[str, Any],
) -> dict[str, Any]:
    """A configuration table on simulated events, several shards of them, written below `folder`.

    `data` adds keys to section data; other sections are given whole: `model={"name": "sasrec", "dim": 8}`.
    """
    world = {"events": events, "users": users, "items": items}
    return {
        "run": {"name": name, "output": str(folder)},
        "data": {"source": "simulated", "shard_events": 4000, "simulated": world, **(data or {})},
        **sections,
    }


@cache
def shipped(path: Path) -> Config:
    """A configuration of jobs/configs, loaded once for all tests."""
    return load_config(str(path))
