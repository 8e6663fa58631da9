"""The `recray` command inside the test's process, which costs no imports and uses the Ray of the tests."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from recray import cli


@dataclass(frozen=True)
class Output:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def recray_command(*arguments: str) -> Output:
    """`recray ARGUMENTS`, from its entry point on."""
    out, err = io.StringIO(), io.StringIO()
    with _restored(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv = ["recray", *arguments]
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Output(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """Undo what the command sets for its process: arguments, environment and the handlers of the logger."""
    logger = logging.getLogger("recray")
    before = logger.handlers[:], logger.level, logger.propagate
    arguments, environment = sys.argv, dict(os.environ)
    try:
        yield
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
        sys.argv = arguments
        os.environ.clear()
        os.environ.update(environment)
