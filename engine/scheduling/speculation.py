"""The seams for speculation: what the step loop needs of a drafter, a verifier and a pace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.scheduling.plan import PlannedRow


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens to follow a request's, each with a bucket of its own: how well founded it is.

    What a bucket is worth, if all tokens before it stand, is learned; a drafter only sorts them.
    """

    tokens: list[int]
    buckets: list[int]  # of each token


NO_DRAFT = Draft([], [])
PENDING = -1  # a token that a drafter promises, and writes if it is chosen
FORCED = -1  # the bucket of a token that a constraint leaves no choice about


class Drafter(Protocol):
    """Proposes tokens that the target model will probably produce."""

    name: str

    @property
    def acceptance(self) -> Sequence[float]:
        """What share of each bucket's tokens stands, before anything was observed."""
        ...

    def propose(self, request_id: str, tokens: Sequence[int], max_tokens: int) -> Draft:
        """Up to `max_tokens` tokens to follow `tokens` (prompt and answer so far), or none.

        They may be PENDING: promised, at a cost that is paid for those that are chosen.
        """
        ...

    def materialize(self, rows: Sequence[PlannedRow]) -> list[PlannedRow]:
        """The same rows with tokens in place of the PENDING ones of their drafts, or fewer."""
        ...

    def finish(self, request_id: str) -> None:
        """Forget what is kept about a request; unknown ids are no error."""
        ...


class DraftLengthController(Protocol):
    """Decides how much of each draft a step verifies. It changes when tokens come, never which."""

    def choose(
        self, drafts: Sequence[tuple[str, Draft]], num_rows: int, num_answers: int
    ) -> list[int]:
        """Tokens to verify of each request's draft in one step.

        Without drafts the step has `num_rows` tokens to compute and gives `num_answers` tokens.
        """
        ...

    def produced(self, request_id: str, tokens: Sequence[int]) -> None:
        """What came in that step; tells about the whole draft, whatever part was verified."""
        ...

    def stepped(self, num_rows: int, seconds: float) -> None:
        """A step of answers and their drafts, no prompt in it, computed `num_rows` tokens."""
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
    pace: DraftLengthController | None = None  # None: every draft is verified whole

    def choose(
        self, drafts: Sequence[tuple[str, Draft]], num_rows: int, num_answers: int
    ) -> list[int]:
        """Tokens to verify of each request's draft; see `DraftLengthController`."""
        if self.pace is None:
            return [len(draft.tokens) for _, draft in drafts]
        return self.pace.choose(drafts, num_rows, num_answers)

    def produced(self, request_id: str, tokens: Sequence[int]) -> None:
        """What came in a step; see `DraftLengthController`."""
        if self.pace is not None:
            self.pace.produced(request_id, tokens)

    def stepped(self, num_rows: int, seconds: float) -> None:
        """What a step took; see `DraftLengthController`."""
        if self.pace is not None:
            self.pace.stepped(num_rows, seconds)

    def finish(self, request_id: str) -> None:
        """Forget what is kept about a request; unknown ids are no error."""
        self.drafter.finish(request_id)
        if self.pace is not None:
            self.pace.finish(request_id)
