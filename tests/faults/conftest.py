"""The table of faults, printed after the tests: fault, what is lost, seconds to recover."""

from __future__ import annotations

import pytest

from helpers.faults import Table

_TABLE = Table()


@pytest.fixture(scope="session")
def table() -> Table:
    return _TABLE


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _TABLE.rows:
        terminalreporter.write_line(line)
