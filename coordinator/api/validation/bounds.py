"""The error for more of something than a request may have."""

from __future__ import annotations

from engine.base.errors import InvalidRequest


def check_count(field: str, num: int, most: int, what: str) -> None:
    """Raise InvalidRequest where `num` of `what` are more than `most`."""
    if num > most:
        raise InvalidRequest(field, f"{num} {what}; expected at most {most}")
