"""The shared stack of tests that only send requests, and the logs of stacks in failed tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.stack import QUICK, SHARED, SharedStacks, Stack


@pytest.fixture
def stack(stacks: SharedStacks) -> Stack:
    """One prefill and one decode worker in fp32. A test leaves it at rest and its workers alive.

    A test that needs a prompt which is not cached sends a `cache_salt` of its own.
    """
    return stacks.get(*SHARED)


@pytest.fixture
def quick_stack(stacks: SharedStacks) -> Stack:
    """The same for tests that compare answers with each other, not with a record in fp32."""
    return stacks.get(*QUICK)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A failed or timed out test shows the logs of its stacks."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    used = [x for x in getattr(item, "funcargs", {}).values() if isinstance(x, Stack)]
    for running in used if report.failed else ():
        for name, text in running.logs().items():
            report.sections.append((f"log of {name}", "\n".join(text.splitlines()[-40:])))
