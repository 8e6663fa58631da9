"""Errors that cross Ray: the RecrayError that a task or worker raised, out of the exceptions that Ray wraps it in."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TypeGuard

from recray import errors
from recray.errors import RecrayError

# Ray Data wraps a task's error once more, and pickling keeps no more of it than its traceback's text, to which Ray Data
# appends advice on retries.
_IN_TRACEBACK = re.compile(
    r"^recray\.errors\.(\w+): (.*?)(?=\n\s*\n|\nFailed to apply |\nTo change retry |\Z)", re.MULTILINE | re.DOTALL
)
_ADVICE = re.compile(r"\n(Failed to apply |To change retry ).*", re.DOTALL)  # also appended to the error itself
# What the workers that are left say when another one is gone.
_LOST = re.compile(
    r"gloo|nccl|processgroup|connection (closed|reset|refused)|timed out waiting|broken pipe|worker health check",
    re.IGNORECASE,
)
# Where Ray names a worker's host and process.
_HOST, _PID = re.compile(r"\b(?:hostname='|ip: )([\w.:-]+)"), re.compile(r"\bpid[=:] ?(\d+)")
_DEPTH = 8  # of wrappers; a chain of causes may be a ring


def unwrap(error: BaseException) -> RecrayError | None:
    """The error that recray raised in a Ray task, actor or training worker; None if Ray or other code raised it.

    A RecrayError is returned as it is; a wrapped one is copied, so that it prints without Ray's frames and advice.
    """
    if _is_plain(error) and not _ADVICE.search(str(error)):
        return error
    for cause in _causes(error, _DEPTH):
        if _is_plain(cause):
            return type(cause)(_ADVICE.sub("", str(cause)))
    found = _IN_TRACEBACK.search(str(error))
    kind = getattr(errors, found[1], None) if found else None
    return kind(found[2]) if found and kind else None


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """A RecrayError that Ray wrapped leaves the block without its wrapping."""
    try:
        yield
    except Exception as error:
        found = unwrap(error)
        if found is None or found is error:
            raise
        raise found from None


def lost_worker(error: BaseException) -> bool:
    """Whether training ended because a process or node was lost, or did not answer: it can be started again.

    The other workers fail in a collective, whose text is all that tells. An error of recray's own, or of a model, would
    come back.
    """
    from ray import exceptions

    if unwrap(error) is not None:
        return False
    system = (
        exceptions.RayActorError,
        exceptions.WorkerCrashedError,
        exceptions.NodeDiedError,
        exceptions.RaySystemError,
    )
    causes = list(_causes(error, _DEPTH))
    if any(isinstance(cause, (*system, exceptions.OutOfMemoryError)) for cause in causes):
        return True
    return any(_LOST.search(str(cause)) is not None for cause in causes)


def summary(error: BaseException) -> str:
    """One line about an error that Ray wrapped: the worker that was lost, else the last line of its innermost text."""
    lost = [line for cause in _causes(error, _DEPTH) if (line := _lost(cause))]
    if lost:
        return ", ".join(dict.fromkeys(lost))
    innermost = list(_causes(error, _DEPTH))[-1]
    lines = [line.strip() for line in str(innermost).splitlines() if line.strip()] or [type(innermost).__name__]
    return lines[-1][:200]


def _lost(error: BaseException) -> str:
    """The workers of a WorkerGroupError that ended or do not answer, by rank, host and process."""
    lines = []
    for rank, failure in sorted((getattr(error, "worker_failures", None) or {}).items()):
        text = "\n".join(str(cause) for cause in _causes(failure, _DEPTH))
        host, pid = _HOST.search(text), _PID.search(text)
        if host and pid:
            what = "did not answer" if "hanging" in text else "ended"
            lines.append(f"worker {rank} on {host[1]} {what} (process {pid[1]})")
    return ", ".join(lines)


def _is_plain(error: BaseException) -> TypeGuard[RecrayError]:
    """Whether recray made it. Ray also makes classes that inherit from RecrayError and RayTaskError, whose text is a
    traceback."""
    return isinstance(error, RecrayError) and type(error).__module__ == errors.__name__


def _causes(error: BaseException, depth: int) -> Iterator[BaseException]:
    """The error and everything that it wraps, outermost first."""
    yield error
    workers = list((getattr(error, "worker_failures", None) or {}).values())  # of ray.train.WorkerGroupError
    health = getattr(error, "health_check_failure", None)  # of a worker that does not answer Ray Train's controller
    for inner in (*workers, health, getattr(error, "cause", None), error.__cause__):
        if isinstance(inner, BaseException) and depth:
            yield from _causes(inner, depth - 1)
