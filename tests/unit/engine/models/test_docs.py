"""docs/models.md lists what the code has: architectures, types, and the tests behind each yes."""

from __future__ import annotations

import re

from engine.checkpoint.gguf_header import TYPES
from engine.checkpoint.packaged import PACKAGED
from engine.checkpoint.packing import KINDS
from engine.models.architecture import Architecture, architectures
from tests.models.tiny_models import ARCHITECTURES, PACKINGS
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "models.md").read_text()


def rows(title: str) -> list[list[str]]:
    """The cells of the first table of a section."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert table
    lines = table[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_architecture_has_a_row_and_every_row_an_architecture() -> None:
    table = {row[1].strip("`"): row for row in rows("Architectures")}
    assert set(table) == {a.name for a in architectures()} == set(ARCHITECTURES)
    for architecture in architectures():
        _check(architecture, table[architecture.name])


def _check(architecture: Architecture, row: list[str]) -> None:
    _, _, gguf, exact, packed, speculation, gpu = row
    assert (exact, speculation, gpu) == ("yes", "yes", "not yet run"), row
    assert packed == ("yes" if architecture.native else "torch"), row
    named = set(re.findall(r"`([^`]+)`", gguf))
    known = {a.gguf for a in architectures()}
    assert named <= known, row
    assert not architecture.gguf or architecture.gguf in named, row


def test_every_type_has_a_row() -> None:
    table = {row[0]: row[1:] for row in rows("Formats")}
    assert list(table) == [name for name, _, _ in TYPES.values()]
    for name, num_values, num_bytes in TYPES.values():
        bits = num_bytes * 8 / num_values
        kept = name.lower() in KINDS
        memory, word = (f"{bits:g}", "yes") if kept else ("16", "as bf16")
        assert table[name] == [f"{bits:g}", memory, word], name


def test_every_packing_runs_in_a_stack() -> None:
    assert {*KINDS, "f16", "f32"} == set(PACKINGS)


def test_files_and_names_of_the_page_exist() -> None:
    for path in set(re.findall(r"`((?:tests|engine|docs)/[\w/.]+)`", PAGE)):
        assert (ROOT / path).exists(), path
    assert all(f"`{name}`" in PAGE for name in PACKAGED)
