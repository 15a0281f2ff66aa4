"""What a step computes: its rows, and the budgets that they are taken from."""

from __future__ import annotations

from dataclasses import dataclass

from engine.scheduling.request import Request


@dataclass(frozen=True, slots=True)
class Budgets:
    """What one step and one pool take at most; a role is a part of it (`RoleBudgets`)."""

    prompt_tokens: int  # computed a step, over all prompts
    num_seqs: int  # requests that hold memory at once
    owner_wait_s: float = 30.0
    aging_tokens_per_s: float = 50.0  # a second of waiting is worth so many tokens less to compute
    num_logits: int = 1 << 30  # positions of answers and drafts of one step: each costs memory


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """What one request computes in a step: tokens [start, start + num_tokens) and then `draft`.

    Its logits are those of its last positions: first what tells of the prompt, last what may give
    tokens.
    """

    request: Request
    num_tokens: int
    draft: list[int]

    @property
    def num_sampled(self) -> int:
        """Positions that may give a token: none in mid-prompt."""
        request = self.request
        if not request.wants_tokens or self.num_tokens < request.num_pending:
            return 0
        return 1 + len(self.draft)

    @property
    def num_scored(self) -> int:
        """Positions whose logits tell of the prompt's next token, and are wanted for that."""
        request = self.request
        if request.work.num_prompt_logprobs is None:
            return 0
        end = request.num_computed + self.num_tokens
        begin = max(request.num_computed, request.num_scored)
        return max(0, min(end, request.num_to_score) - begin)

    @property
    def num_logits(self) -> int:
        """Logits wanted, of the row's last positions."""
        if not self.num_scored:
            return self.num_sampled
        request = self.request
        return self.num_tokens - max(0, request.num_scored - request.num_computed)


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
        if not request.samples:
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
        self._left_for_others -= 0 if request.samples else count
        self._left_to_score -= count if scores else 0
        self._untouched = self._untouched and count == 0
        return count
