"""The drafts of one step: proposed, fitted to constraints, cut to what pays and to spare memory.

proposal  d0 d1 d2 d3 d4     what the drafter gives, within the answer's limits
fitted    d0 d1 d2 d3        what the constraint allows
chosen    d0 d1 d2           what the controller verifies
row       t d0 d1            what fits in spare blocks and logits
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.constraints import Matcher
from engine.scheduling.plan import PlannedRow
from engine.scheduling.request import NO_SLOT, Request
from engine.scheduling.slots import DecodeSlots
from engine.scheduling.speculation import FORCED, PENDING, Draft, Speculation


class DraftPlanner:
    """Made for one scheduling pass and thrown away.

    `spare`: blocks that drafts may take; no request is preempted or kept waiting for a draft.
    """

    def __init__(
        self,
        speculation: Speculation,
        slots: DecodeSlots,
        block_size: int,
        max_model_len: int,
        spare: int,
    ) -> None:
        self._speculation = speculation
        self._slots = slots
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._spare = spare

    def plan(
        self, decoding: Sequence[Request], chunks: Sequence[PlannedRow], max_logits: int
    ) -> list[PlannedRow]:
        """The rows of requests with a draft, where one pays, or without a slot; then the chunks.

        A request with a draft leaves its slot for this step.
        """
        decoding = [*self._slots.requests, *decoding]
        proposals = [(str(r.key), self._propose(r)) for r in decoding]
        num_rows = len(decoding) + sum(row.num_tokens for row in chunks)
        num_answers = len(decoding) + sum(row.num_sampled for row in chunks)
        lengths = self._speculation.choose(proposals, num_rows, num_answers)
        logits_left = max(0, max_logits - num_answers)
        rows = []
        for request, (_, proposal), length in zip(decoding, proposals, lengths, strict=True):
            if length:
                length = min(length, self._room_left(request), logits_left)
            if not length:
                if request.slot == NO_SLOT:
                    rows.append(PlannedRow.of(request, 1))
                continue
            self._slots.leave(request)
            logits_left -= length
            num_tokens = len(request.tokens) + length
            self._spare -= request.table.missing(num_tokens)
            request.table.reserve(num_tokens)
            rows.append(PlannedRow.of(request, 1, tuple(proposal.tokens[:length])))
        return [*rows, *chunks]

    def _propose(self, request: Request) -> Draft:
        """The longest draft of which every token could still be part of the answer."""
        stop, num_tokens = request.work.stop, len(request.tokens)
        assert stop is not None
        limit = max(
            0,
            min(
                self._speculation.max_draft_tokens,
                stop.max_tokens - (num_tokens - request.num_prompt) - 1,
                self._max_model_len - num_tokens - 1,
            ),
        )
        limit = min(limit, self._room_left(request))
        draft = self._speculation.drafter.propose(str(request.key), request.tokens, limit)
        matcher = request.work.matcher
        return draft if matcher is None else fitted(draft, matcher, limit)

    def _room_left(self, request: Request) -> int:
        """Positions beyond the known tokens in the request's blocks and the spare ones."""
        room = request.table.num_positions + self._spare * self._block_size
        return room - len(request.tokens)


def fitted(draft: Draft, matcher: Matcher, limit: int) -> Draft:
    """A draft that the constraint allows: forced tokens, then the drafter's as far as they fit.

    PENDING tokens are checked when they are materialized.
    """
    forced = matcher.forced()[:limit]
    size = len(forced)
    if size and draft.tokens[:size] != forced:
        return Draft(forced, [FORCED] * size)
    if PENDING in draft.tokens:
        return draft
    num_valid = matcher.num_valid(draft.tokens) if draft.tokens else 0
    buckets = [FORCED] * size + draft.buckets[size:num_valid]
    return Draft(draft.tokens[:num_valid], buckets[:num_valid])


def fitted_row(row: PlannedRow) -> PlannedRow:
    """The row with as much of its draft as its constraint allows."""
    matcher = row.request.work.matcher
    return row if matcher is None else row.with_draft(row.draft[: matcher.num_valid(row.draft)])
