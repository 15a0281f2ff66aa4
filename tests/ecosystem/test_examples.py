"""The examples of docs/api.md and docs/client.md, run as they stand against a stack.

Blocks marked `sh` and `python` are examples; addresses are those of the stack. What needs a program
or a package that is not here is skipped with the reason.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.support.paths import ROOT
from tests.support.stack import DEFAULT, SharedStacks, Stack

PAGES = ("api", "client")
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
PACKAGES = ("openai", "tritonclient", "grpc", "pydantic")
pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class Example:
    """One block and the heading that it stands under."""

    page: str
    heading: str
    language: str
    code: str

    @property
    def lacks(self) -> str:
        """What is not here and it needs; "" where nothing is."""
        if self.language == "sh":
            programs = {line.split()[0] for line in self.code.splitlines() if line[:1].isalpha()}
            return ", ".join(sorted(p for p in programs if not shutil.which(p)))
        used = [p for p in PACKAGES if re.search(rf"^(import|from) {p}\b", self.code, re.MULTILINE)]
        return ", ".join(p for p in used if importlib.util.find_spec(p) is None)


def examples() -> list[Example]:
    found = []
    for page in PAGES:
        text = (ROOT / "docs" / f"{page}.md").read_text()
        for block in BLOCK.finditer(text):
            headings = [m[1] for m in HEADING.finditer(text[: block.start()])]
            found.append(Example(page, headings[-1], block[1], block[2]))
    return found


EXAMPLES = examples()


@pytest.fixture
def stack(stacks: SharedStacks) -> Iterator[Stack]:
    running = stacks.get(*DEFAULT)
    yield running
    running.assert_at_rest()


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 15
    assert {"sh", "python"} == {example.language for example in EXAMPLES}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: f"{e.page}-{e.heading}-{e.language}")
def test_example(stack: Stack, example: Example) -> None:
    if example.lacks:
        pytest.skip(f"not here: {example.lacks}")
    code = example.code.replace("127.0.0.1:8000", stack.http_address)
    for address in ("127.0.0.1:50051", "one:50051,two:50051"):
        code = code.replace(address, stack.address)
    if example.language == "sh":
        fails = 'set -e; curl() { command curl --fail-with-body "$@"; }\n'
        command = ["bash", "-c", fails + code]
    else:
        command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, f"{example.code}\n{done.stdout}\n{done.stderr}"
    assert done.stdout.strip(), "an example shows something"
