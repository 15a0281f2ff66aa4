"""The words check: counts idioms that a reader stumbles over, and fails on new ones.

    python -m tests.words [--write]

The words are plain technical English: the component is the subject, the field's terms name things.
`tests/data/words.json` holds how many of each idiom a file may keep (most of them speak of people);
`--write` lowers these counts after some were removed, and never raises one.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.support.paths import DATA, ROOT

IDIOMS = {
    "who": r"who|whom|whoever|whomever",
    "nobody": r"nobody|somebody|everybody|anybody",
    "told": r"(?:is|are|was|were|be|been|being) told",
    "says": r"says",
    "by itself": r"(?:by|of) itself|its own word",
    "home": r"(?:goes?|going|sent|find|found) home",
    "the door": r"the door",
    "the hinge": r"the hinge|one hinge",
    "names of blocks": (
        r"names? of (?:a |the |its |these )?blocks?|blocks?(?:'s?)? names?|block_names?"
    ),
    "private names": (
        r"Drawer|Drawn|UNWRITTEN|give_up_making|Announcer|let_go|deep_threads|WorkerHost|doubtful"
        r"|in doubt|Patience|Intake|switchboard|Switchboard|home_name|name_salt|wires"
    ),
}
SUFFIXES = {".py", ".c", ".h", ".md", ".proto", ".toml", ".sh", ".yaml", ".yml", ".mjs", ""}
LIMITS = DATA / "words.json"
OWN = {"tests/words.py", "tests/unit/docs/test_words.py"}

Counts = dict[str, dict[str, int]]


def count(text: str) -> dict[str, int]:
    """How often each idiom occurs in a text; without those that do not."""
    found = {
        idiom: len(re.findall(rf"(?<![\w`.-])(?:{pattern})(?![\w-])", text, re.IGNORECASE))
        for idiom, pattern in IDIOMS.items()
    }
    return {idiom: number for idiom, number in found.items() if number}


def tracked() -> list[Path]:
    """The repository's texts, relative to its root; generated code and data are none."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    paths = [Path(name) for name in listed.stdout.split("\0") if name and name not in OWN]
    return [
        path
        for path in paths
        if path.suffix in SUFFIXES
        and not {"pb", "data", "LICENSE"} & set(path.parts)
        and (ROOT / path).is_file()
    ]


def counts() -> Counts:
    """Idioms of each file that has some."""
    found = {}
    for path in tracked():
        text = (ROOT / path).read_text()
        if path.name == "README.md" and len(path.parts) == 1:
            text = text.split("\n\n", 2)[-1]  # the first paragraph may call the transfer a hinge
        if some := count(text):
            found[str(path)] = some
    return found


def complaints(found: Counts, limits: Counts) -> list[str]:
    """A line for each idiom that a file has more often than it may."""
    return [
        f"{path}: {idiom!r} {number} times, at most {limits.get(path, {}).get(idiom, 0)}"
        for path, idioms in sorted(found.items())
        for idiom, number in idioms.items()
        if number > limits.get(path, {}).get(idiom, 0)
    ]


def lowered(found: Counts, limits: Counts) -> Counts:
    """The limits without what is no longer there."""
    kept = {
        path: {
            idiom: min(number, found.get(path, {}).get(idiom, 0)) for idiom, number in some.items()
        }
        for path, some in limits.items()
    }
    least = {path: {i: n for i, n in some.items() if n} for path, some in kept.items()}
    return {path: some for path, some in sorted(least.items()) if some}


def main() -> int:
    """0 where no file has more idioms than it may, else 1, with a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="lower the counts that are kept")
    arguments = parser.parse_args()
    found = counts()
    limits: Counts = json.loads(LIMITS.read_text())
    if arguments.write:
        LIMITS.write_text(json.dumps(lowered(found, limits), indent=1) + "\n")
    lines = complaints(found, limits)
    print("\n".join(lines) or f"words: {sum((Counter(f) for f in found.values()), Counter())}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
