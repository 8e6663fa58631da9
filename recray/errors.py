"""Every error that recray raises on purpose.

    RecrayError
    +-- ConfigError         the configuration is wrong: a key, a value, a combination
    +-- DataError           the input data is wrong: a column, a type, a value, a file
    +-- StorageError        a URI cannot be read or written
    +-- LineageError        two artefacts that do not belong together
    +-- NotApplicableError  a baseline that this log does not allow
    +-- DependencyError     an optional package is missing
    +-- ResourceError       the machine or cluster lacks what was asked for
    +-- ClusterError        a Ray cluster cannot be reached, or refuses
    +-- Interrupted         training was asked to stop, and has saved its state

A message says what is wrong, where, what is allowed and what to do next. The
message is the only constructor argument, so every error survives pickling and
crosses a process boundary whole.
"""


class RecrayError(Exception):
    """Root of all errors that recray raises on purpose."""


class ConfigError(RecrayError):
    """The configuration is wrong."""


class DataError(RecrayError):
    """The input data is wrong."""


class StorageError(RecrayError):
    """A URI cannot be read or written."""


class LineageError(RecrayError):
    """Two artefacts do not belong together."""


class NotApplicableError(RecrayError):
    """A baseline that this log does not allow; it is left out of the report, which says why."""


class DependencyError(RecrayError):
    """An optional package is missing."""


class ResourceError(RecrayError):
    """The machine or cluster lacks what was asked for."""


class ClusterError(RecrayError):
    """A Ray cluster cannot be reached, or refuses."""


class Interrupted(RecrayError):
    """Training was asked to stop, and has saved its state."""
