"""Shared stacks: one for each set of flags, and a few at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.support import stack as stack_module
from tests.support.stack import SharedStacks


class FakeStack:
    """Notes its life."""

    alive: ClassVar[list[FakeStack]] = []

    def __init__(self, folder: Path, *flags: str, prefill: int, decode: int) -> None:
        self.flags = flags
        self.num_checks = 0

    def start(self) -> FakeStack:
        FakeStack.alive.append(self)
        return self

    def ready(self) -> bool:
        return True

    def assert_at_rest(self) -> None:
        self.num_checks += 1

    def stop(self) -> None:
        FakeStack.alive.remove(self)


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(stack_module, "Stack", FakeStack)
    monkeypatch.setattr(FakeStack, "alive", [])
    return SharedStacks(lambda: tmp_path)


def test_equal_flags_are_one_stack_which_is_looked_at_each_time(shared: Any) -> None:
    first = shared.get("--a", prefill=1, decode=2)
    assert first.num_checks == 0
    assert shared.get("--a", prefill=1, decode=2) is first
    assert first.num_checks == 1
    assert shared.get("--a") is not first
    assert shared.get("--b", prefill=1, decode=2) is not first


def test_all_end_at_the_close(shared: Any) -> None:
    first, second = shared.get("--a"), shared.get("--b")
    assert FakeStack.alive == [first, second]
    shared.close()
    assert not FakeStack.alive
    assert shared.get("--a") is not first


def test_the_one_used_longest_ago_ends_first(shared: Any) -> None:
    a, b, c = (shared.get(flag) for flag in ("--a", "--b", "--c"))
    assert shared.get("--a") is a
    d = shared.get("--d")
    assert FakeStack.alive == [a, c, d]
    assert b not in FakeStack.alive
