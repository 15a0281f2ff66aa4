"""All objects of a JSON document, and the value that a reference in it leads to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote


def objects_in(value: object) -> Iterator[dict[str, Any]]:
    """Each object in a value, from the outside inwards, in the order of the text."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            yield each
            waiting += reversed(each.values())
        elif isinstance(each, list):
            waiting += reversed(each)


def at_pointer(root: object, pointer: str) -> object:
    """The value at a JSON pointer, as a fragment of a URI has it; None where there is none."""
    found = root
    for step in unquote(pointer).split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict):
            found = found.get(name)
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            return None
    return found
