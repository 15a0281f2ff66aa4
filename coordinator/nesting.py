"""How deeply JSON of a caller may be nested: what walks through it later recurses."""

from __future__ import annotations

from typing import Any

MAX_DEPTH = 100


def depth(value: Any) -> int:
    """Levels of arrays and objects; stops counting just above the bound."""
    levels, level = 0, [value]
    while level and levels <= MAX_DEPTH:
        levels += 1
        below = []
        for container in level:
            items = container.values() if isinstance(container, dict) else container
            below += [item for item in items if isinstance(item, dict | list)]
        level = below
    return levels
