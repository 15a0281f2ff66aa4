"""What holds for every run of tests: hypothesis profiles, log lines, and the count of law 1's
exceptions.

ci      the default: the same examples each time
full    other examples each time, ten times as many where a test sets no number of its own
        (pytest --hypothesis-profile=full)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from hypothesis import settings

from tests.support.near_tie import TALLY
from tests.support.stack import SharedStacks

settings.register_profile("ci", deadline=None, derandomize=True)
settings.register_profile("full", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("ci")

# structlog's default prints all locals with a traceback: seconds, in which an event loop stalls.
structlog.dev.ConsoleRenderer.get_active().exception_formatter = structlog.dev.plain_traceback


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-answers", action="store_true", help="write the oracles' answers to tests/data"
    )


@pytest.fixture(scope="session")
def record_answers(request: pytest.FixtureRequest) -> bool:
    """Whether this run computes the oracles' answers and writes them to files."""
    return bool(request.config.getoption("--record-answers"))


@pytest.fixture(scope="session")
def checkpoint() -> Any:
    """(checkpoint, tokenizer, chat template) of the default model, without its weights."""
    from coordinator.text.chat_template import ChatTemplate
    from coordinator.text.tokenizer import Tokenizer
    from engine.checkpoint.source import resolve

    found = resolve("smollm2")
    return found, Tokenizer.load(found.folder), ChatTemplate.load(found.folder)


@pytest.fixture(scope="session")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedStacks]:
    """Running stacks by their flags."""
    shared = SharedStacks(lambda: tmp_path_factory.mktemp("stack"))
    yield shared
    shared.close()


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
