"""The seams for speculation: a drafter, a verifier and a draft length, as the step loop needs.

What they keep of a request is in arrays, at the request's `draft_id`: a small number that it has
from its first draft to its end.

    propose -> choose -> materialize -> (the target's forward pass) -> observe -> verify -> produced
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.scheduling.plan import PlannedRow
from engine.scheduling.request import NO_DRAFT_ID, Request

Ints = NDArray[np.int64]
Tokens = NDArray[np.int32]
PENDING = -1  # a token that a drafter computes only if it is chosen
FORCED = -1  # the bucket of a token that a constraint forces


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens to follow a request's, each with a confidence bucket.

    The acceptance probability of a bucket, given that all tokens before it were accepted, is
    learned; a drafter only sorts its tokens into buckets.
    """

    tokens: list[int]
    buckets: list[int]  # of each token


@dataclass(frozen=True, slots=True)
class Drafts:
    """The drafts of R requests. What lies beyond a draft's length has no meaning."""

    tokens: Tokens  # [R, width]
    buckets: Tokens  # [R, width]
    lengths: Ints  # [R]

    @classmethod
    def empty(cls, num_rows: int, width: int) -> Drafts:
        """Room for drafts of at most `width` tokens."""
        tokens, buckets = np.full((2, num_rows, width), PENDING, np.int32)
        return cls(tokens, buckets, np.zeros(num_rows, np.int64))

    def __getitem__(self, row: int) -> Draft:
        length = self.lengths[row]
        return Draft(self.tokens[row, :length].tolist(), self.buckets[row, :length].tolist())

    def __setitem__(self, row: int, draft: Draft) -> None:
        length = self.lengths[row] = len(draft.tokens)
        self.tokens[row, :length] = draft.tokens
        self.buckets[row, :length] = draft.buckets


@dataclass(frozen=True, slots=True)
class DraftInputs:
    """The R requests to draft for."""

    ids: Ints  # [R], their draft ids
    histories: Sequence[list[int]]  # prompt and answer so far
    lengths: Ints  # [R], of the histories
    limits: Ints  # [R]: at most so many tokens


class StepResult(Protocol):
    """What a drafter sees of a step: `engine.runner.base.StepOutput`, without its torch types."""

    @property
    def logits(self) -> Any:
        """Fp32 [S, vocab], on the model's device: of the slots, then of the rows."""

    @property
    def hidden(self) -> Any:
        """[S, hidden] before the output head; None where the runner does not keep it."""


class Drafter(Protocol):
    """Proposes tokens that the target model will probably produce. It owns its model, if any."""

    name: str
    has_kv: bool  # its KV lies in the target's blocks: it then observes every row of every step

    @property
    def acceptance(self) -> Sequence[float]:
        """The prior acceptance probability of each bucket."""

    def propose(self, inputs: DraftInputs) -> Drafts:
        """Tokens to follow each history; none is possible.

        They may be PENDING: computing them costs time, and only chosen ones are computed.
        """

    def materialize(self, rows: Sequence[PlannedRow]) -> list[PlannedRow]:
        """The same rows with tokens in place of the PENDING ones of their drafts, or fewer."""

    def observe(self, output: StepResult, rows: Sequence[PlannedRow]) -> Mapping[int, int]:
        """See a step's rows and its output before any of it is accepted.

        Returns, by request key, the position that the drafter's own KV reaches if the drafts stand;
        nothing where `has_kv` is False. `output` is valid until this returns.
        """

    def produced(self, ids: Ints, tokens: Tokens, counts: Ints) -> None:
        """The first counts[r] of tokens [R, width] were appended to the histories of `ids`."""

    def finish(self, draft_id: int) -> None:
        """Drop the state of a request; unknown ids are no error."""


class DraftLengthController(Protocol):
    """Decides how much of each draft a step verifies. It changes when tokens come, never which."""

    def choose(self, ids: Ints, drafts: Drafts, num_rows: int, num_answers: int) -> Ints:
        """[R] tokens to verify of each request's draft in one step.

        Without drafts the step has `num_rows` tokens to compute and gives `num_answers` tokens.
        """

    def produced(self, ids: Ints, tokens: Tokens, counts: Ints) -> None:
        """The tokens of that step, as for a drafter; they show the quality of the whole drafts."""

    def stepped(self, num_rows: int, seconds: float) -> None:
        """A step of answers and their drafts, no prompt in it, computed `num_rows` tokens."""

    def finish(self, draft_id: int) -> None:
        """Drop the state of a request; unknown ids are no error."""


# (drafts [R, width], padded with PENDING; the sampler's tokens [R, width + 1] after each prefix of
# them) -> how many tokens of each draft are accepted [R]
Verify = Callable[[Tokens, Tokens], Ints]


@dataclass(frozen=True, slots=True)
class Speculation:
    """The drafter, the verifier and the draft length."""

    drafter: Drafter
    verify: Verify
    max_draft_tokens: int
    draft_length: DraftLengthController | None = None  # None: every draft is verified whole
    _free_ids: list[int] = field(default_factory=lambda: [0])  # the last is the next one

    def id_of(self, request: Request) -> int:
        """Its draft id, which is given to it here."""
        if request.draft_id == NO_DRAFT_ID:
            request.draft_id = self._free_ids.pop()
            if not self._free_ids:
                self._free_ids.append(request.draft_id + 1)
        return request.draft_id

    def choose(self, ids: Ints, drafts: Drafts, num_rows: int, num_answers: int) -> Ints:
        """Tokens to verify of each request's draft; see `DraftLengthController`."""
        if self.draft_length is None:
            return drafts.lengths
        return self.draft_length.choose(ids, drafts, num_rows, num_answers)

    def produced(self, ids: Ints, tokens: Tokens, counts: Ints) -> None:
        """The tokens of a step; see `Drafter` and `DraftLengthController`."""
        self.drafter.produced(ids, tokens, counts)
        if self.draft_length is not None:
            self.draft_length.produced(ids, tokens, counts)

    def stepped(self, num_rows: int, seconds: float) -> None:
        """The duration of a step; see `DraftLengthController`."""
        if self.draft_length is not None:
            self.draft_length.stepped(num_rows, seconds)

    def finish(self, request: Request) -> None:
        """Drop what is kept of a request; one that never had a draft is no error."""
        draft_id, request.draft_id = request.draft_id, NO_DRAFT_ID
        if draft_id == NO_DRAFT_ID:
            return
        self.drafter.finish(draft_id)
        if self.draft_length is not None:
            self.draft_length.finish(draft_id)
        self._free_ids.append(draft_id)


def grown(array: NDArray[Any], num_rows: int) -> NDArray[Any]:
    """The array, with at least `num_rows` rows: new ones are zero."""
    if num_rows <= len(array):
        return array
    more = np.zeros((max(num_rows, 2 * len(array)) - len(array), *array.shape[1:]), array.dtype)
    return np.concatenate([array, more])
