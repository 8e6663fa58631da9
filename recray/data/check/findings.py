"""What `recray check` reports: findings with their cost and their fix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """error: prepare stops there, or reads something wrong. warning: it costs time, memory or quality. note: good to know."""

    level: Level
    name: str  # e.g. "small_files"
    what: str
    cost: str = ""  # what it costs if it stays
    fix: str = ""  # the command or key that fixes it
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checked:
    """facts: figures of the log by name, shown above the findings."""

    source: str
    facts: dict[str, str]
    findings: list[Finding]

    @property
    def problems(self) -> list[Finding]:
        return [one for one in self.findings if one.level != "note"]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def render(found: Checked) -> str:
    """As text: facts, then findings, the worst first."""
    width = max(map(len, found.facts), default=0)
    lines = [found.source, *(f"  {name:{width}}  {value}" for name, value in found.facts.items())]
    for level in ("error", "warning", "note"):
        for one in found.findings:
            if one.level == level:
                lines += ["", f"{level.upper():7}  {one.name}: {one.what}"]
                lines += [f"         {word}: {text}" for word, text in (("cost", one.cost), ("fix", one.fix)) if text]
    count = len(found.problems)
    verdict = "no problems found" if not count else f"{count} problem{'s' * (count > 1)} found"
    return "\n".join([*lines, "", verdict])
