"""Commands in the documentation, so that tests can run them.

A fenced block of sh, python or toml in a page carries a mark on the line before it:

    <!-- test: run -->                        it runs in the fast suite
    <!-- test: slow -->                       it runs with the slow tests
    <!-- test: no, it needs a cluster -->     it does not run here, and why

A toml block without a mark must be a valid configuration. The blocks of one page run in order in one folder, so that a
later command finds what an earlier one wrote. Of a `console` block the lines after `$ ` are commands, the others output.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from helpers.configs import REPOSITORY

LANGUAGES = {"sh": "sh", "bash": "sh", "shell": "sh", "console": "console", "python": "python", "toml": "toml"}
_MARK = re.compile(r"<!-- test: (run|slow|no, .+) -->")
_FENCE = re.compile(r"(?P<indent> *)```(?P<language>\w*)")
# A line of an indented block that is a command: nothing marks those.
_INDENTED = re.compile(r" {4,}(recray|python|pip|make|ray|kubectl|docker|git|export|\$) ?\S")


@dataclass(frozen=True)
class Block:
    """One fenced block: where it starts, its language, what its mark says, and its text."""

    page: Path
    line: int
    language: str
    mark: Literal["run", "slow", "no", ""]
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"

    def script(self) -> str:
        """The commands of a sh or console block."""
        if self.language != "console":
            return self.text
        return "\n".join(line[2:] for line in self.text.splitlines() if line.startswith("$ "))


def pages() -> list[Path]:
    """Every page of the repository that tells its reader what to type."""
    found = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("*/README.md"), *REPOSITORY.glob("*/*/README.md")]
    return sorted(page for page in found if not page.relative_to(REPOSITORY).parts[0].startswith((".", "runs")))


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page in a language of LANGUAGES, in order."""
    lines = page.read_text().splitlines()
    found: list[Block] = []
    start, language, indent, mark = 0, None, "", ""
    for number, line in enumerate(lines):
        fence = _FENCE.fullmatch(line.rstrip())
        if fence is None:
            continue
        if language is None:
            start, language, indent = number, fence["language"], fence["indent"]
            marked = _MARK.fullmatch(lines[number - 1].strip()) if number else None
            mark = marked[1].partition(",")[0] if marked else ""
            continue
        if language in LANGUAGES:
            text = "\n".join(inner.removeprefix(indent) for inner in lines[start + 1 : number])
            found.append(Block(page, start + 1, LANGUAGES[language], mark, text))  # type: ignore[arg-type]
        language = None
    return found


def indented_commands(page: Path) -> list[str]:
    """Commands in indented blocks, outside of fences."""
    fenced, found = False, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if _FENCE.match(line):
            fenced = not fenced
        elif not fenced and _INDENTED.match(line):
            found.append(f"{page.name}:{number}: {line.strip()}")
    return found
