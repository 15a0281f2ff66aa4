"""What every run prints at its end: law 1's exceptions, counted."""

from __future__ import annotations

import pytest

from tests.support.near_tie import TALLY


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TALLY.num_answers:
        terminalreporter.write_line(str(TALLY))
