"""What a step computes: its rows, and the budgets that they are taken from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from engine.scheduling.request import Request
from engine.scheduling.slots import DecodeSlots


@dataclass(frozen=True, slots=True)
class Budgets:
    """What one step and one pool take at most; a role is a part of it (`RoleBudgets`)."""

    prompt_tokens: int  # computed a step, over all prompts
    num_seqs: int  # requests that hold memory at once
    owner_wait_s: float = 30.0
    aging_tokens_per_s: float = 50.0  # a second of waiting is worth so many tokens less to compute
    num_logits: int = 1 << 30  # positions of answers and drafts of one step: each costs memory


def blocks_ahead(prompt_tokens: int, block_size: int) -> int:
    """Blocks that a column with a window needs from the next position on: a whole chunk, the rest
    of its last block, and a draft of up to a block.
    """
    return -(-prompt_tokens // block_size) + 3


class PlannedRow(NamedTuple):
    """The tokens [start, start + num_tokens) of one request in a step, and then its draft.

    Only the last positions of a row have logits: first those that score the prompt's next token,
    then those that may give a token. A step has hundreds of rows: a tuple is built in a third of
    the time of a frozen dataclass.
    """

    request: Request
    num_tokens: int
    draft: tuple[int, ...]
    num_scored: int  # positions whose logits score the prompt's next token
    num_sampled: int  # positions that may give a token: none in mid-prompt

    @classmethod
    def of(cls, request: Request, num_tokens: int, draft: tuple[int, ...] = ()) -> PlannedRow:
        """The row of the next `num_tokens` tokens of `request`."""
        num_scored = num_sampled = 0
        if request.wants_tokens and num_tokens >= request.num_pending:
            num_sampled = 1 + len(draft)
        if request.work.num_prompt_logprobs is not None:
            end = min(request.num_computed + num_tokens, request.num_to_score)
            num_scored = max(0, end - max(request.num_computed, request.num_scored))
        return cls(request, num_tokens, draft, num_scored, num_sampled)

    def with_draft(self, draft: tuple[int, ...]) -> PlannedRow:
        """The same row with another draft."""
        return self.of(self.request, self.num_tokens, draft)

    @property
    def num_logits(self) -> int:
        """How many of the row's last positions have logits."""
        if not self.num_scored:
            return self.num_sampled
        request = self.request
        return self.num_tokens - max(0, request.num_scored - request.num_computed)


@dataclass(frozen=True, slots=True)
class Plan:
    """A step: the newest token of each slot and its draft, and then the rows.

    The slots are the scheduler's own: they stay as they are until the step is accepted.
    """

    slots: DecodeSlots
    rows: list[PlannedRow]

    def __len__(self) -> int:
        return len(self.slots) + len(self.rows)

    @property
    def requests(self) -> list[Request]:
        """Of the slots, and of the rows."""
        return [*self.slots.requests, *(row.request for row in self.rows)]

    @property
    def num_slot_logits(self) -> int:
        """Logits of the slots, which come before those of the rows; they compute as many tokens."""
        return len(self.slots) + int(self.slots.num_draft.sum())

    @property
    def num_tokens(self) -> int:
        """To compute, drafts included."""
        of_rows = sum(row.num_tokens + len(row.draft) for row in self.rows)
        return self.num_slot_logits + of_rows


# Positions whose logits one step computes to score prompts: a vocabulary of floats each; and beside
# answers that are being written, for which the step is to stay short.
MAX_SCORED = 256
MAX_SCORED_BESIDE = 4
FAIR_SHARE = 4
FIRST_RANK = -(1 << 63)  # before all priorities


class StepBudget:
    """Prompt tokens left in one scheduling pass; made for it and thrown away."""

    def __init__(
        self, prompt_tokens: int, max_scored: int = MAX_SCORED, for_others: int | None = None
    ) -> None:
        """`for_others`: how many of the tokens may be of requests that only compute KV."""
        self._left = prompt_tokens
        self._left_for_others = prompt_tokens if for_others is None else for_others
        self._left_to_score = max_scored
        self._untouched = True

    def take(self, request: Request, block_size: int, is_held: bool = False) -> int:
        """Tokens of the request's next chunk, 0 if there is no room.

        A chunk that is not the last ends on a block border: only whole blocks can be announced. A
        held request keeps its last token for later.
        """
        scores = request.num_scored < request.num_to_score
        count = min(request.num_pending - is_held, self._left)
        if not request.is_answer:
            count = min(count, self._left_for_others)
        if scores:
            count = min(count, self._left_to_score)
        if 0 < count < request.num_pending:
            cut = (request.num_computed + count) % block_size
            if cut < count:
                count -= cut
            elif not self._untouched:
                count = 0
        self._left -= count
        self._left_for_others -= 0 if request.is_answer else count
        self._left_to_score -= count if scores else 0
        self._untouched = self._untouched and count == 0
        return count
