"""Plain answers as arrays: one slot each, edited when an answer enters, leaves or gets a block.

    slot       0    1    2    3                 leave(r9): the last slot takes its place
    requests   r7   r9   r8   r11       -->     r7   r11  r8
    length     ...

An answer is plain if its tokens depend on their logits, parameters and positions alone: no
constraint, no penalty, no log-probabilities. A step computes all slots as a whole, each with the
draft that the step verifies for it. Uncommon answers and prompts are rows of their own
(`PlannedRow`).

A Request stays true: its tokens and progress are advanced with its slot, so any request can leave
its slot between two steps and go on as a row. Owned by the engine thread.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.base.types import SamplingParams
from engine.scheduling.request import NO_SLOT, Request

MAX_STOPS = 16  # stop ids of a plain answer
_NO_TOKEN = -1
_ARRAYS = ("length", "newest", "room", "end", "draft_id", "_stops")
T = TypeVar("T")


class DecodeSlots:
    """The plain answers of one engine.

    Attributes:
        requests: of each slot; `histories`, `tables` and `params` are parts of these.
        length: int64 [>= slots]; known tokens. The last of them is computed next.
        newest: int64 [>= slots]; that token.
        room: int64 [>= slots]; positions that fit in the blocks.
        end: int64 [>= slots]; length that ends the answer.
        draft_id: int64 [>= slots]; see `speculation`.
        drafts: int32 [slots, width]; of the step under way, padded with -1.
        num_draft: int64 [slots]; tokens of each.
    """

    def __init__(self, max_model_len: int) -> None:
        self.requests: list[Request] = []
        self.histories: list[list[int]] = []  # shared with the request, which appends to it, too
        self.tables: list[NDArray[np.int32]] = []
        self.params: list[SamplingParams] = []
        self.length = np.zeros(16, np.int64)
        self.newest = np.zeros(16, np.int64)
        self.room = np.zeros(16, np.int64)
        self.end = np.zeros(16, np.int64)
        self.draft_id = np.zeros(16, np.int64)
        self._stops = np.full((16, MAX_STOPS), _NO_TOKEN, np.int64)
        self._max_model_len = max_model_len
        self.set_no_drafts()

    def __len__(self) -> int:
        return len(self.requests)

    def enter(self, request: Request) -> None:
        """Give a plain, decoding request a slot."""
        slot, stop, sampling = len(self.requests), request.work.stop, request.work.sampling
        assert stop is not None and sampling is not None and request.slot == NO_SLOT
        if slot == len(self.length):
            self._grow()
        request.slot = slot
        self.requests.append(request)
        self.histories.append(request.tokens)
        self.tables.append(request.table.ids)
        self.params.append(sampling)
        self.length[slot] = len(request.tokens)
        self.newest[slot] = request.tokens[-1]
        self.room[slot] = request.table.num_positions
        self.end[slot] = request.end(self._max_model_len)
        self.draft_id[slot] = request.draft_id
        self._stops[slot] = _NO_TOKEN
        self._stops[slot, : len(stop.stop_token_ids)] = list(stop.stop_token_ids)

    def leave(self, request: Request) -> None:
        """Take a request out, unless it has no slot; the last slot takes its place."""
        slot = request.slot
        if slot == NO_SLOT:
            return
        request.slot = NO_SLOT
        last = len(self.requests) - 1
        _replace_by_last(self.requests, slot)
        _replace_by_last(self.histories, slot)
        _replace_by_last(self.tables, slot)
        _replace_by_last(self.params, slot)
        if slot != last:
            self.requests[slot].slot = slot
            for name in _ARRAYS:
                array = getattr(self, name)
                array[slot] = array[last]

    def without_room(self) -> list[Request]:
        """Requests whose blocks have no room for their newest token."""
        count = len(self.requests)
        return [self.requests[i] for i in np.flatnonzero(self.length[:count] > self.room[:count])]

    def got_blocks(self, request: Request) -> None:
        """The table of a request has changed; it need not have a slot."""
        if request.slot != NO_SLOT:
            self.tables[request.slot] = request.table.ids
            self.room[request.slot] = request.table.num_positions

    def set_no_drafts(self) -> None:
        """The step has no drafts for the slots."""
        count = len(self.requests)
        self.drafts, self.num_draft = np.zeros((count, 0), np.int32), np.zeros(count, np.int64)

    def set_drafts(self, tokens: NDArray[np.int32], lengths: NDArray[np.int64]) -> None:
        """The step verifies the first lengths[i] of tokens [>= slots, width] for slot i."""
        count = len(self.requests)
        width = int(lengths[:count].max(initial=0))
        is_token = np.arange(width) < lengths[:count, None]
        self.drafts = np.where(is_token, tokens[:count, :width], np.int32(_NO_TOKEN))
        self.num_draft = lengths[:count]

    def append(
        self, tokens: NDArray[np.int32], counts: NDArray[np.int64]
    ) -> tuple[list[list[int]], list[int]]:
        """Advance slot i by the first counts[i] of tokens [slots, width], or to the answer's end.

        Returns each slot's new tokens, and the slots whose answer ends with them.
        """
        count, width = tokens.shape
        length, newest = self.length[:count], self.newest[:count]
        new: list[list[int]] = tokens.tolist()
        if width == 1:  # a step without drafts, the shortest: few calls count
            length += 1
            newest[:] = tokens[:, 0]
            ended = (tokens == self._stops[:count]).any(1) | (length >= self.end[:count])
        else:
            number = np.arange(1, width + 1)
            ends = (tokens[:, :, None] == self._stops[:count, None, :]).any(2)
            ends |= length[:, None] + number >= self.end[:count, None]
            ends &= number <= counts[:, None]
            ended = ends.any(1)
            kept = np.where(ended, ends.argmax(1) + 1, counts)
            length += kept
            newest[:] = tokens[np.arange(count), kept - 1]
            new = [row[:end] for row, end in zip(new, kept.tolist(), strict=True)]
        for history, more in zip(self.histories, new, strict=True):
            history += more
        for request, known in zip(self.requests, length.tolist(), strict=True):
            request.num_computed = known - 1
        return new, np.flatnonzero(ended).tolist()

    def _grow(self) -> None:
        for name in _ARRAYS:
            array = getattr(self, name)
            setattr(self, name, np.concatenate([array, array]))


def _replace_by_last(values: list[T], index: int) -> None:
    values[index] = values[-1]
    values.pop()


def is_plain(request: Request) -> bool:
    """Whether a decoding request may have a slot."""
    work = request.work
    sampling, stop = work.sampling, work.stop
    if sampling is None or stop is None:
        return False
    num_output = len(request.tokens) - request.num_prompt
    return (
        0 < num_output < stop.max_tokens
        and (num_output >= stop.min_tokens or not stop.stop_token_ids)
        and len(stop.stop_token_ids) <= MAX_STOPS
        and work.matcher is None
        and work.num_logprobs is None
        and work.num_prompt_logprobs is None
        and work.announce_from < 0
        and not (sampling.penalizes or sampling.logit_bias)
    )
