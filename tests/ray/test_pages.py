"""What the pages tell their readers to type does what they say (tests/helpers/pages.py says how blocks are marked)."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.configs import REPOSITORY
from helpers.pages import Block, blocks, pages
from recray.config import parse_config

PAGES = pages()


def _name(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_command_is_marked(page: Path) -> None:
    unmarked = [block.where for block in blocks(page) if block.language != "toml" and not block.mark]
    assert unmarked == [], (
        "put <!-- test: run -->, <!-- test: slow --> or <!-- test: no, REASON --> before these blocks"
    )


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_toml_blocks_are_configurations(page: Path) -> None:
    for block in blocks(page):
        if block.language == "toml" and block.mark != "no":
            parse_config(tomllib.loads(block.text))


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.mark == "run" for b in blocks(p))], ids=_name)
def test_commands_run(page: Path, tmp_path: Path) -> None:
    _run([block for block in blocks(page) if block.mark == "run"], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", [p for p in PAGES if any(b.mark == "slow" for b in blocks(p))], ids=_name)
def test_slow_commands_run(page: Path, tmp_path: Path) -> None:
    _run([block for block in blocks(page) if block.mark in ("run", "slow")], tmp_path)


def _run(found: list[Block], folder: Path) -> None:
    """Runs blocks in order in a folder with the repository's jobs/ and a log of clicks at clicks/, as a clone has."""
    environment = _reader(folder)
    for block in found:
        if block.language == "toml":
            continue
        command = [sys.executable, "-"] if block.language == "python" else ["bash", "-euo", "pipefail", "-s"]
        done = subprocess.run(
            command, input=block.script(), cwd=folder, env=environment, capture_output=True, text=True, timeout=1700
        )
        assert done.returncode == 0, f"{block.where}\n{block.script()}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def _reader(folder: Path) -> dict[str, str]:
    """Fills the folder that commands run in; the environment, in which `recray` and `python` are this installation."""
    for name in ("jobs", "cluster", "docker", "recray"):
        (folder / name).symlink_to(REPOSITORY / name)
    rng = np.random.default_rng(0)
    users, groups = rng.integers(0, 200, 6000), rng.integers(0, 20, 6000)
    log = {"user_id": users, "item_id": users % 5 * 20 + groups, "timestamp": 1_700_000_000 + np.arange(6000) * 60}
    (folder / "clicks").mkdir()
    pq.write_table(pa.table(log), folder / "clicks" / "part-0.parquet")
    (folder / "bin").mkdir()
    for name, command in (("recray", f"{sys.executable} -m recray"), ("python", sys.executable)):
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        script.chmod(0o755)
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    return os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY)}


PAGE = """
<!-- test: run -->
```sh
echo one > file  # kept for the next block
test -d jobs/configs
```

<!-- test: no, it needs a cluster -->
```sh
ray up cluster.yaml
```

1. A list:

   <!-- test: run -->
   ```console
   $ cat file
   one
   $ python -c 'import recray; print(recray.__version__)'
   ```

<!-- test: slow -->
```python
print("slow")
```

```toml
[model]
dim = 8
```

<!-- test: run
echo two >> file
-->
<!-- test: run -->

    python -c "import sys; sys.exit(open('file').read() != 'one\\ntwo\\n')"   # indented
    test -f clicks/part-0.parquet

    recray run my.toml

    recray/          a tree of folders
    python = "toml"
"""


def test_blocks_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "PAGE.md"
    page.write_text(PAGE)
    found = blocks(page)
    assert [(block.language, block.mark) for block in found] == [
        ("sh", "run"),
        ("sh", "no"),
        ("console", "run"),
        ("python", "slow"),
        ("toml", ""),
        ("sh", "run"),
        ("sh", "run"),
        ("sh", ""),
    ]
    assert found[2].script().splitlines() == ["cat file", "python -c 'import recray; print(recray.__version__)'"]
    assert found[-1].text == "recray run my.toml"
    (tmp_path / "reader").mkdir()
    _run([block for block in found if block.mark == "run"], tmp_path / "reader")
    page.write_text("<!-- test: run -->\n```sh\ntrue\nfalse\n```\n")
    (tmp_path / "other").mkdir()
    with pytest.raises(AssertionError, match=r"PAGE.md:2"):
        _run(blocks(page), tmp_path / "other")
