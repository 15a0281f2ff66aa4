"""The drafts of one step: proposed, fitted to constraints, cut to what pays and to spare memory.

proposal  d0 d1 d2 d3 d4     what the drafter gives, within the answer's limits
fitted    d0 d1 d2 d3        what the constraint allows
chosen    d0 d1 d2           what the controller verifies
row       t d0 d1            what fits in spare blocks and logits
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.constraints import Matcher
from engine.scheduling.plan import PlannedRow
from engine.scheduling.request import Request
from engine.scheduling.slots import DecodeSlots
from engine.scheduling.speculation import FORCED, PENDING, Draft, DraftInputs, Ints, Speculation


@dataclass(slots=True, eq=False)
class DraftPlanner:
    """Made for one scheduling pass and thrown away.

    `spare`: blocks that drafts may take; no request is preempted or kept waiting for a draft.
    """

    speculation: Speculation
    slots: DecodeSlots
    block_size: int
    max_model_len: int
    spare: int

    def plan(
        self, decoding: Sequence[Request], chunks: Sequence[PlannedRow], max_logits: int
    ) -> list[PlannedRow]:
        """Give the slots their drafts; the rows of the others, with theirs, and then the chunks."""
        slots, num_slots = self.slots, len(self.slots)
        arrays = (slots.draft_id, slots.length, slots.room, slots.end)
        columns = [array[:num_slots] for array in arrays]
        if decoding:
            others = zip(*map(self._numbers, decoding), strict=True)
            columns = [
                np.append(of_slots, more) for of_slots, more in zip(columns, others, strict=True)
            ]
        ids, known, room, end = columns
        # Every token of a draft can still be part of the answer; one more follows it.
        limits = np.minimum(end - 1, room + self.spare * self.block_size) - known
        limits = _within(limits, self.speculation.max_draft_tokens)
        histories = [*slots.histories, *(r.tokens for r in decoding)]
        drafts = self.speculation.drafter.propose(DraftInputs(ids, histories, known, limits))
        for i, request in enumerate(decoding, num_slots):
            if request.work.matcher is not None:
                drafts[i] = fitted(drafts[i], request.work.matcher, int(limits[i]))
        num_rows = len(ids) + sum(row.num_tokens for row in chunks)
        num_answers = len(ids) + sum(row.num_sampled for row in chunks)
        lengths = self.speculation.choose(ids, drafts, num_rows, num_answers)
        if lengths.any():
            lengths = _shared(lengths, max(0, max_logits - num_answers))
            lengths = self._with_room(known, room, lengths, [*slots.requests, *decoding])
            slots.set_drafts(drafts.tokens, lengths)
        else:
            slots.set_no_drafts()
        rows = []
        for i, request in enumerate(decoding, num_slots):
            tokens = drafts.tokens[i, : lengths[i]].tolist() if lengths[i] else ()
            rows.append(PlannedRow.of(request, 1, tuple(tokens)))
        return [*rows, *chunks]

    def _numbers(self, request: Request) -> tuple[int, int, int, int]:
        """What slots have as `draft_id`, `length`, `room` and `end`."""
        draft_id, end = self.speculation.id_of(request), request.end(self.max_model_len)
        return draft_id, len(request.tokens), request.table.num_positions, end

    def _with_room(
        self, known: Ints, room: Ints, lengths: Ints, requests: Sequence[Request]
    ) -> Ints:
        """The lengths that fit in the requests' blocks and the spare ones, which are taken."""
        missing = np.maximum(0, -(-(known + lengths - room) // self.block_size))
        taken = _shared(missing, self.spare)
        for i in np.flatnonzero(taken).tolist():
            table = requests[i].table
            table.reserve(table.num_positions + int(taken[i]) * self.block_size)
            self.slots.got_blocks(requests[i])
        out: Ints = np.minimum(lengths, room + taken * self.block_size - known)
        return out


def _shared(requested: Ints, available: int) -> Ints:
    """So much of each request as is available, the first ones first."""
    before = np.cumsum(requested) - requested
    return _within(available - before, requested)


def _within(values: Ints, most: Ints | int) -> Ints:
    """Each value from 0 to `most`. np.clip takes several times as long for a few values."""
    out: Ints = np.minimum(np.maximum(values, 0), most)
    return out


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
