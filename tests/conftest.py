"""What holds for every run of tests: hypothesis profiles, and the count of law 1's exceptions.

ci      the default: the same examples each time
full    other examples each time, ten times as many where a test sets no number of its own
        (pytest --hypothesis-profile=full)
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

from tests.support.near_tie import TALLY

settings.register_profile("ci", deadline=None, derandomize=True)
settings.register_profile("full", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("ci")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A parallel test process sends its count to the one that prints."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["law_1"] = TALLY.counts()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add up what a parallel test process has counted; one that crashed sends nothing."""
    counts = getattr(node, "workeroutput", {}).get("law_1")
    if counts:
        TALLY.add(*counts)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what has been compared with an oracle and excused."""
    if TALLY.num_answers:
        terminalreporter.write_line(str(TALLY))
