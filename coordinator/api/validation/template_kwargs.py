"""The check of the variables that a client gives to the chat template. Pure."""

from __future__ import annotations

from typing import Any

from coordinator.api.validation.bounds import check_count
from coordinator.api.validation.tools import parse_json
from engine.base.errors import InvalidRequest

MAX_CHARS = 16 << 10
# Variables that the server sets.
_RESERVED = frozenset(
    (
        *("messages", "tools", "documents", "add_generation_prompt"),
        *("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token"),
        *("mask_token", "raise_exception", "strftime_now"),
    )
)


def check_template_kwargs(field: str, source: str) -> dict[str, Any]:
    """The variables of a JSON object; an empty text is none. Raises InvalidRequest."""
    if not source:
        return {}
    check_count(field, len(source), MAX_CHARS, "characters")
    values = parse_json(field, source)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InvalidRequest(field, "expected a JSON object")
    for name in values:
        if not name.isidentifier() or name.startswith("_"):
            raise InvalidRequest(field, f"{name[:40]!r} is no name of a variable")
        if name in _RESERVED:
            raise InvalidRequest(field, f"{name} is set by the server; leave it out")
    return values
