"""The words check: what it counts, what it passes over, and that limits only fall."""

from __future__ import annotations

import pytest

from tests import words


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("the worker who waits, and whoever asks", {"who": 2}),
        ("Nobody reads it.", {"nobody": 1}),
        ("The engine is told; it was told.", {"told": 2}),
        ("the names of blocks, a block's name", {"names of blocks": 2}),
        ("whole, whose, told-off, `who`", {}),
        ("The coordinator sends the block's hash.", {}),
    ],
)
def test_idioms_are_counted(text, found):
    assert words.count(text) == found


def test_one_more_than_the_limit_is_an_error():
    found = {"a.py": {"who": 2}, "b.py": {"told": 1}}
    assert words.complaints(found, {"a.py": {"who": 2}, "b.py": {"told": 1}}) == []
    assert words.complaints(found, {"a.py": {"who": 1}}) == [
        "a.py: 'who' 2 times, at most 1",
        "b.py: 'told' 1 times, at most 0",
    ]


def test_limits_fall_with_what_was_removed_and_never_rise():
    limits = {"a.py": {"who": 3, "told": 1}, "gone.py": {"who": 1}}
    found = {"a.py": {"who": 2}, "new.py": {"who": 5}}
    assert words.lowered(found, limits) == {"a.py": {"who": 2}}


def test_the_files_are_the_repository_s_own():
    paths = {str(path) for path in words.tracked()}
    assert {"README.md", "engine/kernels/decoder.c", "tests/conftest.py"} <= paths
    assert not [path for path in paths if "/pb/" in path or path.startswith("tests/data/")]
