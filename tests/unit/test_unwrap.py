"""RecrayErrors out of what Ray wraps around them."""

import pickle

import pytest

from recray.cluster.errors import unwrap, unwrapped
from recray.errors import ConfigError, DataError, RecrayError


class _WorkerGroupError(Exception):
    """As ray.train's: failures by rank."""

    def __init__(self, failures: dict[int, Exception]) -> None:
        super().__init__("Training failed due to worker errors")
        self.worker_failures = failures


class _TaskError(Exception):
    """As ray.exceptions.RayTaskError: the text is a traceback, the cause an attribute."""

    def __init__(self, cause: Exception | None, text: str = "ray::task() (pid=1)") -> None:
        super().__init__(text)
        self.cause = cause


class _Both(_TaskError, DataError):
    """Ray derives such classes from a task's error, so that `except DataError` works."""


_TRACEBACK = """ray::map() (pid=2, ip=10.0.0.1)
  File "task.py", line 3, in task
recray.errors.DataError: column 'item' has 3 nulls;
fill them

The above exception was the direct cause of the following exception:
"""


# What Ray Data 2.60 makes of an error in map_batches: it is wrapped, or has the advice in its own text.
_ADVICE = """Failed to apply UDF transform after 1/1 attempts (total backoff 0.0s).
To change retry attempts, backoff, or which errors are retried, configure `ray.data.DataContext.get_current()`."""
_RAY_DATA = f"""ray::MapBatches(read)() (pid=2, ip=10.0.0.1)
recray.errors.DataError: column 'item' has 3 nulls; fill them
{_ADVICE}"""


def _caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (_TaskError(DataError("bad column")), DataError, "bad column"),
        (_Both(DataError("bad column")), DataError, "bad column"),
        (_WorkerGroupError({0: ValueError("x"), 1: ConfigError("bad key")}), ConfigError, "bad key"),
        (_WorkerGroupError({1: _TaskError(ConfigError("bad key"))}), ConfigError, "bad key"),
        (_caused(RuntimeError("outer"), _TaskError(DataError("inner"))), DataError, "inner"),
        (_TaskError(None, _TRACEBACK), DataError, "column 'item' has 3 nulls;\nfill them"),
        (_TaskError(DataError(f"bad column\n{_ADVICE}")), DataError, "bad column"),
        (DataError(f"bad column\n{_ADVICE}"), DataError, "bad column"),
        (_TaskError(None, _RAY_DATA), DataError, "column 'item' has 3 nulls; fill them"),
    ],
)
def test_the_error_comes_out_as_it_was_raised(error: Exception, kind: type[RecrayError], text: str) -> None:
    found = unwrap(error)
    assert type(found) is kind and str(found) == text
    assert str(pickle.loads(pickle.dumps(found))) == text
    with pytest.raises(kind) as raised, unwrapped():
        raise error
    assert type(raised.value) is kind and raised.value.__suppress_context__


def test_other_errors_stay_as_they_are() -> None:
    ring = ValueError("of user code")
    ring.__cause__ = RuntimeError("a ring of causes")
    ring.__cause__.__cause__ = ring
    for error in (ValueError("of user code"), _WorkerGroupError({0: ValueError("x")}), ring):
        assert unwrap(error) is None
        with pytest.raises(type(error)) as raised, unwrapped():
            raise error
        assert raised.value is error
    plain = DataError("raised here")
    assert unwrap(plain) is plain
