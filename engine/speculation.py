"""The seam for drafting: what the step loop needs of a drafter and a verifier, both injected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


class Drafter(Protocol):
    """Proposes tokens that the target model will probably produce."""

    name: str

    def propose(self, request_id: str, tokens: Sequence[int], max_tokens: int) -> list[int]:
        """Up to `max_tokens` tokens to follow `tokens` (prompt and answer so far), or none."""
        ...

    def finish(self, request_id: str) -> None:
        """Forget what is kept about a request; unknown ids are no error."""
        ...


@dataclass(frozen=True, slots=True)
class Verified:
    """`tokens`: the accepted draft prefix, then the recovered or the bonus token."""

    num_accepted: int
    tokens: tuple[int, ...]


# (draft, the sampler's token at each of len(draft) + 1 positions) -> what stands
Verify = Callable[[Sequence[int], Sequence[int]], Verified]


@dataclass(frozen=True, slots=True)
class Speculation:
    """Who drafts, how much, and who decides."""

    drafter: Drafter
    verify: Verify
    max_draft_tokens: int
