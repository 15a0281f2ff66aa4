"""The seams for speculation: a drafter, a verifier and a draft length, as the step loop needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engine.scheduling.plan import PlannedRow


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens to follow a request's, each with a confidence bucket.

    The acceptance probability of a bucket, given that all tokens before it were accepted, is
    learned; a drafter only sorts its tokens into buckets.
    """

    tokens: list[int]
    buckets: list[int]  # of each token


NO_DRAFT = Draft([], [])
PENDING = -1  # a token that a drafter computes only if it is chosen
FORCED = -1  # the bucket of a token that a constraint forces


class StepResult(Protocol):
    """What a drafter sees of a step: `engine.runner.base.StepOutput`, without its torch types."""

    @property
    def logits(self) -> Any:
        """Fp32 [S, vocab], on the model's device: of the slots, then of the rows."""
        ...

    @property
    def hidden(self) -> Any:
        """[S, hidden] before the output head; None where the runner does not keep it."""
        ...


class Drafter(Protocol):
    """Proposes tokens that the target model will probably produce. It owns its model, if any.

    Each step: propose -> materialize -> (the target's forward pass) -> observe -> accepted
    """

    name: str
    has_kv: bool  # its KV lies in the target's blocks: it then observes every row of every step

    @property
    def acceptance(self) -> Sequence[float]:
        """The prior acceptance probability of each bucket."""
        ...

    def propose(self, request_id: str, tokens: Sequence[int], max_tokens: int) -> Draft:
        """Up to `max_tokens` tokens to follow `tokens` (prompt and answer so far), or none.

        They may be PENDING: computing them costs time, and only chosen ones are computed.
        """
        ...

    def materialize(self, rows: Sequence[PlannedRow]) -> list[PlannedRow]:
        """The same rows with tokens in place of the PENDING ones of their drafts, or fewer."""
        ...

    def observe(self, output: StepResult, rows: Sequence[PlannedRow]) -> Mapping[int, int]:
        """See a step's rows and its output before any of it is accepted.

        Returns, by request key, the position that the drafter's own KV reaches if the drafts stand;
        nothing where `has_kv` is False. `output` is valid until this returns.
        """
        ...

    def finish(self, request_id: str) -> None:
        """Drop the state of a request; unknown ids are no error."""
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
        """The tokens of that step; they show the quality of the whole draft, verified or not."""
        ...

    def stepped(self, num_rows: int, seconds: float) -> None:
        """A step of answers and their drafts, no prompt in it, computed `num_rows` tokens."""
        ...

    def finish(self, request_id: str) -> None:
        """Drop the state of a request; unknown ids are no error."""
        ...


@dataclass(frozen=True, slots=True)
class Verified:
    """`tokens`: the accepted draft prefix, then the recovered or the bonus token."""

    num_accepted: int
    tokens: tuple[int, ...]


# (draft, the sampler's token at each of len(draft) + 1 positions) -> the accepted tokens
Verify = Callable[[Sequence[int], Sequence[int]], Verified]


@dataclass(frozen=True, slots=True)
class Speculation:
    """The drafter, the verifier and the draft length."""

    drafter: Drafter
    verify: Verify
    max_draft_tokens: int
    draft_length: DraftLengthController | None = None  # None: every draft is verified whole

    def choose(
        self, drafts: Sequence[tuple[str, Draft]], num_rows: int, num_answers: int
    ) -> list[int]:
        """Tokens to verify of each request's draft; see `DraftLengthController`."""
        if self.draft_length is None:
            return [len(draft.tokens) for _, draft in drafts]
        return self.draft_length.choose(drafts, num_rows, num_answers)

    def produced(self, request_id: str, tokens: Sequence[int]) -> None:
        """The tokens of a step; see `DraftLengthController`."""
        if self.draft_length is not None:
            self.draft_length.produced(request_id, tokens)

    def stepped(self, num_rows: int, seconds: float) -> None:
        """The duration of a step; see `DraftLengthController`."""
        if self.draft_length is not None:
            self.draft_length.stepped(num_rows, seconds)

    def finish(self, request_id: str) -> None:
        """Drop the state of a request; unknown ids are no error."""
        self.drafter.finish(request_id)
        if self.draft_length is not None:
            self.draft_length.finish(request_id)
