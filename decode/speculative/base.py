"""The drafter that proposes nothing. The contract is `engine.speculation.Drafter`."""

from __future__ import annotations

from collections.abc import Sequence


class NoDrafter:
    """Proposes nothing: one token a step."""

    name = "none"

    def propose(self, request_id: str, tokens: Sequence[int], max_tokens: int) -> list[int]:
        """Nothing."""
        return []

    def finish(self, request_id: str) -> None:
        """Nothing is held."""
