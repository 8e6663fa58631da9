"""Commands in the documentation, so that tests can run them.

A block of a page is fenced (sh, console, python, toml), or indented and starts with a command. A mark stands before it:

    <!-- test: run -->                        it runs in the fast suite
    <!-- test: slow -->                       it runs with the slow tests
    <!-- test: no, it needs a cluster -->     it does not run here, and why

A mark without its end on the same line holds commands of its own, up to `-->`: what the reader does by hand, such as
editing a file. A toml block without a mark must be a valid configuration. The blocks of one page run in order in one
folder, so that a later command finds what an earlier one wrote. Of a `console` block the lines after `$ ` are commands.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from helpers.configs import REPOSITORY

LANGUAGES = {"sh": "sh", "bash": "sh", "shell": "sh", "console": "console", "python": "python", "toml": "toml"}
_MARK = re.compile(r"<!-- test: (?P<mark>run|slow|no(?=, .)).*?(?P<end>-->)?")
_FENCE = re.compile(r"(?P<indent> *)```(?P<language>\w*)")
_COMMAND = re.compile(r" {4,}(recray|python|pip|make|ray|kubectl|docker|git|export) +(?!=)[^ ]")
_TREE = re.compile(r" {4,}\w+/? {3,}")  # a line of a table in an indented block, such as a tree of folders


@dataclass(frozen=True)
class Block:
    """One block: where it starts, its language, its mark ("run", "slow", "no", or "" without one), and its text."""

    page: Path
    line: int
    language: str
    mark: str
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
    found = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("*/**/README.md")]
    return sorted(page for page in found if page.relative_to(REPOSITORY).parts[0] not in (".venv", "runs", "build"))


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that a test can run or parse, in order."""
    lines = page.read_text().splitlines()
    found: list[Block] = []
    mark, number = "", 0
    while number < len(lines):
        line, start = lines[number], number + 1
        number += 1
        if marked := _MARK.fullmatch(line.strip()):
            mark = marked["mark"]
            if marked["end"]:
                continue
            end = _index(lines, number, lambda inner: inner.strip() == "-->")
            found.append(Block(page, start, "sh", mark, "\n".join(lines[number:end])))
            number = end + 1
        elif fence := _FENCE.fullmatch(line.rstrip()):
            end = _index(lines, number, lambda inner: inner.strip() == "```")
            if fence["language"] in LANGUAGES:
                text = "\n".join(inner.removeprefix(fence["indent"]) for inner in lines[number:end])
                found.append(Block(page, start, LANGUAGES[fence["language"]], mark, text))
            number = end + 1
        elif _COMMAND.match(line) and not _TREE.match(line):
            end = _index(lines, number, lambda inner: not inner.startswith("    "))
            found.append(Block(page, start, "sh", mark, "\n".join(inner[4:] for inner in lines[start - 1 : end])))
            number = end
        elif not line.strip():
            continue  # a mark counts for the next block, over empty lines
        mark = ""
    return found


def _index(lines: list[str], start: int, ends: Callable[[str], bool]) -> int:
    """Number of the first line from `start` on that ends a block."""
    return next((number for number in range(start, len(lines)) if ends(lines[number])), len(lines))
