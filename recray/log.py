"""What recray says while it works: one logger, `recray`, that is silent until a handler is attached.

    log.info("train", "epoch 1/3  loss 0.4310", event="epoch", values={"epoch": 1, "loss": 0.431})

A record carries the stage that speaks ("train"), the name of the event and its values, so that a
program reads `--json` lines instead of parsing text. As text the line above is
`train: epoch 1/3  loss 0.4310`.

The command line calls `configure`; a program that uses recray as a library attaches handlers of
its own to `logging.getLogger("recray")`. A worker process logs as the process that started it does:
that one sends its `setting()`, and the worker calls `configure_worker`.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any, Literal, TextIO

from recray import strict_json

Format = Literal["rich", "plain", "json"]

_setting = ""  # "<format>:<level>" once configured
_root = logging.getLogger("recray")
_root.addHandler(logging.NullHandler())


def debug(stage: str, message: str, *, event: str = "detail", values: Mapping[str, Any] | None = None) -> None:
    """What only `--verbose` shows."""
    _log(logging.DEBUG, stage, message, event, values)


def info(stage: str, message: str, *, event: str = "message", values: Mapping[str, Any] | None = None) -> None:
    """Progress and results: what a user expects to see."""
    _log(logging.INFO, stage, message, event, values)


def warning(stage: str, message: str, *, event: str = "warning", values: Mapping[str, Any] | None = None) -> None:
    """Something that the user should look at; `--quiet` shows it, too."""
    _log(logging.WARNING, stage, message, event, values)


def error(stage: str, message: str, *, event: str = "error", values: Mapping[str, Any] | None = None) -> None:
    """Why the command ends."""
    _log(logging.ERROR, stage, message, event, values)


def result(stage: str, event: str, values: Mapping[str, Any]) -> None:
    """A command's result as an event; shown at every level."""
    _log(logging.CRITICAL, stage, event, event, values)


def _log(level: int, stage: str, message: str, event: str, values: Mapping[str, Any] | None) -> None:
    logger = logging.getLogger(f"recray.{stage}")
    if logger.isEnabledFor(level):
        fields = {"recray_stage": stage, "recray_event": event, "recray_values": dict(values or {})}
        logger.log(level, "%s: %s", stage, message, extra=fields)


def configure(form: Format, level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Write recray's messages of `level` and above to `stream`: standard output for JSON, else standard error."""
    global _setting
    _setting = f"{'plain' if form == 'rich' else form}:{level}"
    handler: logging.Handler
    if form == "rich":
        # Imported here: a program that uses recray as a library needs no terminal support.
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(
            console=Console(file=stream, stderr=stream is None),
            show_time=False,
            show_level=False,
            show_path=False,
            highlighter=None,
        )
    else:
        handler = _Stream(stream, to_stdout=form == "json")
        handler.setFormatter(_Json() if form == "json" else logging.Formatter("%(message)s"))
    for old in list(_root.handlers):
        _root.removeHandler(old)
    _root.addHandler(handler)
    _root.setLevel(level)
    _root.propagate = False


def setting() -> str:
    """How this process logs, for `configure_worker` in a process that it starts."""
    return _setting


def configure_worker(how: str) -> None:
    """In a worker process: log as the process that started it does. Ray forwards the lines to the driver."""
    form, _, level = how.partition(":")
    if form in ("plain", "json"):
        configure("json" if form == "json" else "plain", int(level or logging.INFO), sys.stdout)


class _Stream(logging.StreamHandler[TextIO]):
    """Writes to what sys.stdout or sys.stderr is at the time of the message, so that redirection works."""

    def __init__(self, stream: TextIO | None, to_stdout: bool) -> None:
        super().__init__(stream)
        self._fixed, self._to_stdout = stream, to_stdout

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = self._fixed or (sys.stdout if self._to_stdout else sys.stderr)
        super().emit(record)


class _Json(logging.Formatter):
    """One JSON object a line: time, level, stage, event, message, and the event's values."""

    def format(self, record: logging.LogRecord) -> str:
        body = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": "result" if record.levelno > logging.ERROR else record.levelname.lower(),
            "stage": getattr(record, "recray_stage", ""),
            "event": getattr(record, "recray_event", "message"),
            "message": record.getMessage(),
            "values": getattr(record, "recray_values", {}),
        }
        return strict_json.dumps(body)
