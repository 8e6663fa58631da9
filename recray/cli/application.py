"""The application: its options, how a verb prints its result, and the entry point.

Messages go to standard error (recray.log), results to standard output. With `--json` both are JSON
lines on standard output: {"stage": ..., "event": ..., "values": ...}.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recray import credentials, log, progress
from recray.errors import Interrupted, RecrayError

if TYPE_CHECKING:
    from recray.config import Config

_GLOBAL = ("--quiet", "-q", "--verbose", "-v", "--json")  # accepted anywhere on the command line
_json = False

app = typer.Typer(
    name="recray",
    help="Recommender training from Parquet click logs to an evaluated index, on Ray.\n\n"
    "Start with your own log:   recray init s3://bucket/clicks/ > my.toml\n\n"
    "then run every stage:      recray run my.toml\n\n"
    "or one by one:             recray prepare my.toml; recray train my.toml; recray index my.toml; "
    "recray evaluate my.toml",
    epilog="--quiet, --verbose and --json may stand anywhere on the command line.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG.toml", help="configuration file, local or any URI")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="section.key=value", help="override one key, e.g. --set training.epochs=5; repeatable"
    ),
]


class Split(StrEnum):
    test = "test"
    valid = "valid"


@app.callback()
def _options(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="warnings and results only")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="details, too")] = False,
    json: Annotated[bool, typer.Option("--json", help="messages and results as JSON lines on standard output")] = False,
) -> None:
    global _json
    _json = json
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    # Results are JSON lines of the same logger: --quiet must not drop them.
    form: log.Format = "json" if json else "rich" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else "plain"
    log.configure(form, level)


def load(path: str, overrides: list[str] | None, starts_ray: bool = False) -> Config:
    """The configuration, and what can be seen to fail before torch and Ray are loaded, which takes seconds."""
    from recray import storage
    from recray.cluster import runtime
    from recray.config import load_config

    config = load_config(path, overrides or [])
    storage.check_writable(config.run_uri)
    if starts_ray or config.scaling.num_workers > 1 or (runtime.is_shared() and config.scaling.num_workers):
        runtime.check()
    return config


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM or Ctrl-C first saves the state of a training, or deletes what another stage has half written; the exit code
    is 128 + the signal's number, as in a shell."""
    from recray.training import interrupt

    # Loading torch and starting Ray take seconds, in which nothing else shows progress.
    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    with interrupt.graceful(), progress.scope():
        try:
            with progress.task("recray", verb, lines=False):
                yield
        except Interrupted as error:
            log.warning("train", str(error), event="stopped")
            raise typer.Exit(128 + (interrupt.received() or signal.SIGTERM)) from None


def made(stage: str, uri: str, record: Any, note: str) -> None:
    """What a stage made: where it lies, its id, and its main figure."""
    text = f"{uri}  {record.id}{f'  {note}' if note else ''}"
    result(stage, "result", text, {"uri": uri, **record.model_dump(mode="json")})


def as_json() -> bool:
    """Whether results are JSON lines."""
    return _json


def result(stage: str, event: str, text: str, values: dict[str, Any]) -> None:
    """A result: `text` for people, or `values` as a JSON line."""
    if _json:
        log.result(stage, event, values)
    else:
        typer.echo(text)


def main() -> None:
    """Entry point: an error that recray raises on purpose is one message and exit code 2, not a traceback."""
    # Options of the whole command may follow the verb, where people write them.
    first = [word for word in sys.argv[1:] if word in _GLOBAL]
    rest = [word for word in sys.argv[1:] if word not in _GLOBAL]
    try:
        for word in rest:
            credentials.refuse(word, "the command line")
        app([*first, *rest])
    except RecrayError as error:
        if _json:
            log.error("recray", f"{type(error).__name__}: {error}", event="error")
        else:
            typer.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(2)
