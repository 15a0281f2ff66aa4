"""Plain answers as arrays: one slot each, edited when an answer enters, leaves or gets a block.

    slot       0    1    2    3                 leave(r9): the last slot takes its place
    requests   r7   r9   r8   r11       -->     r7   r11  r8
    length     ...

An answer is plain if each step gives it one token that depends on its logits, parameters and
position alone: no constraint, no penalty, no log-probabilities. A step computes all slots as a
whole. Uncommon answers, prompts and drafts are rows of their own (`PlannedRow`).

A Request stays true: its tokens and progress are advanced with its slot, so any request can leave
its slot between two steps and go on as a row. Owned by the engine thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.base.types import SamplingParams
from engine.scheduling.request import NO_SLOT, Request

MAX_STOPS = 16  # stop ids of a plain answer
_NO_TOKEN = -1
T = TypeVar("T")


class DecodeSlots:
    """The plain answers of one engine.

    Attributes:
        requests: of each slot; `histories`, `tables` and `params` are parts of these.
        length: int64 [>= slots]; known tokens. The last of them is computed next.
        newest: int64 [>= slots]; that token.
    """

    def __init__(self, max_model_len: int) -> None:
        self.requests: list[Request] = []
        self.histories: list[list[int]] = []  # shared with the request, which appends to it, too
        self.tables: list[NDArray[np.int32]] = []
        self.params: list[SamplingParams] = []
        self.length = np.zeros(16, np.int64)
        self.newest = np.zeros(16, np.int64)
        self._room = np.zeros(16, np.int64)  # positions that fit in the blocks
        self._end = np.zeros(16, np.int64)  # length that ends the answer
        self._stops = np.full((16, MAX_STOPS), _NO_TOKEN, np.int64)
        self._max_model_len = max_model_len

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
        self._room[slot] = request.table.num_positions
        self._end[slot] = min(request.num_prompt + stop.max_tokens, self._max_model_len)
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
            for array in (self.length, self.newest, self._room, self._end, self._stops):
                array[slot] = array[last]

    def without_room(self) -> list[Request]:
        """Requests whose blocks have no room for their newest token."""
        count = len(self.requests)
        return [self.requests[i] for i in np.flatnonzero(self.length[:count] > self._room[:count])]

    def got_blocks(self, request: Request) -> None:
        """The request's table has changed."""
        self.tables[request.slot] = request.table.ids
        self._room[request.slot] = request.table.num_positions

    def append(self, tokens: Sequence[int]) -> list[Request]:
        """Advance each slot by its new token; returns the requests whose answer ends with it."""
        count = len(tokens)
        for history, token in zip(self.histories, tokens, strict=True):
            history.append(token)
        length, newest = self.length[:count], self.newest[:count]
        for request, num_computed in zip(self.requests, length.tolist(), strict=True):
            request.num_computed = num_computed
        length += 1
        newest[:] = tokens
        ended = (self._stops[:count] == newest[:, None]).any(1)
        ended |= length >= self._end[:count]
        return [self.requests[i] for i in np.flatnonzero(ended)]

    def _grow(self) -> None:
        for name in ("length", "newest", "_room", "_end", "_stops"):
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
