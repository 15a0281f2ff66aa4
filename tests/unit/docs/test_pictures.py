"""Pictures of the documentation: drawn from the text beside them, for dark and light mode."""

from __future__ import annotations

import hashlib
import re

import pytest

from tests.support.paths import ROOT

PICTURES = sorted((ROOT / "docs" / "pictures").glob("*.pikchr"))


@pytest.mark.parametrize("source", PICTURES, ids=lambda path: path.stem)
def test_a_picture_is_drawn_from_its_source(source):
    svg = source.with_suffix(".svg").read_text()
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert digest in svg, "the picture is stale: node docs/pictures/draw.mjs"
    assert "prefers-color-scheme:dark" in svg
    assert "rgb(0,0,0)" not in svg, "black would not be seen in dark mode"
    assert not re.search(r"(href|src|url)\W+https?:", svg), "a picture fetches nothing"


def test_each_picture_is_shown_by_a_page():
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    assert PICTURES
    for source in PICTURES:
        assert f"(pictures/{source.stem}.svg)" in pages, source.name
