"""Who proposes draft tokens: a drafter decides when a token comes, never which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Drafter(Protocol):
    """Guesses what a request's next tokens will be. Called from the engine thread only."""

    @property
    def name(self) -> str:
        """The value of --drafter that chose it."""
        ...

    def propose(self, request_id: str, tokens: Sequence[int], max_tokens: int) -> list[int]:
        """0 to `max_tokens` guesses for what follows `tokens` (prompt and accepted answer).

        Between two calls for a request `tokens` only grows, unless `finish` was called.
        """
        ...

    def finish(self, request_id: str) -> None:
        """Forget the request; one that is not known is no error."""
        ...


class NoDrafter:
    """Proposes nothing: one token a step."""

    name = "none"

    def propose(self, request_id: str, tokens: Sequence[int], max_tokens: int) -> list[int]:
        """Nothing."""
        return []

    def finish(self, request_id: str) -> None:
        """Nothing is held."""
