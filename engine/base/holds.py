"""One resource that a process holds, as /debug/holds shows it: with its owner and its end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

NO_DEADLINE = "its caller set none; it ends with its call"  # a note
_ALWAYS = ("kind", "owner", "reason", "age_s", "deadline_s")
_OTHERS = ("note", "num_blocks", "num_tokens", "peer", "request_id")


@dataclass(frozen=True, slots=True)
class Hold:
    """One hold. Fields after the deadline are omitted from the JSON at their defaults."""

    kind: str
    owner: str
    reason: str
    age_s: float
    deadline_s: float | None  # seconds left; below 0: it ends soon; None: see `note`
    note: str = ""
    block_ids: tuple[int, ...] = ()  # shown as their number
    num_tokens: int = 0
    peer: str = ""
    request_id: str = ""

    @property
    def num_blocks(self) -> int:
        """How many KV blocks it holds."""
        return len(self.block_ids)

    def as_json(self) -> dict[str, Any]:
        """The JSON object, with times in seconds to the millisecond."""
        values = {key: getattr(self, key) for key in (*_ALWAYS, *_OTHERS)}
        return {
            key: round(value, 3) if isinstance(value, float) else value
            for key, value in values.items()
            if key in _ALWAYS or value
        }


def holds_as_json(holds: Iterable[Hold]) -> list[dict[str, Any]]:
    """The JSON objects of all holds, the oldest first."""
    return [hold.as_json() for hold in sorted(holds, key=lambda hold: -hold.age_s)]
