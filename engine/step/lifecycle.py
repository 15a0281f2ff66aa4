"""The requests of an engine from their first event to their last.

    add -> admitted ---------------> FetchEvent       blocks are wanted from a peer
              |   each new block --> AnnouncedEvent   pinned for its receiver
              |   each step -------> TokensEvent
              '-> finish ----------> FinishedEvent    exactly one; blocks are released before it

Owned by the engine thread; the events are values for the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.base.errors import DiptychError, Unavailable
from engine.base.kv_layout import column_hash
from engine.base.types import FinishReason, TokenLogprobs
from engine.scheduling.events import (
    AnnouncedEvent,
    Counts,
    Event,
    FetchEvent,
    FinishedEvent,
    TokensEvent,
)
from engine.scheduling.request import Request, State
from engine.scheduling.scheduler import Scheduler


class Lifecycle:
    """Requests by key, and the events that are not taken yet."""

    def __init__(self, scheduler: Scheduler, clock: Callable[[], float]) -> None:
        self.requests: dict[int, Request] = {}
        self._scheduler = scheduler
        self._pool = scheduler.pool
        self._clock = clock
        self._events: list[Event] = []

    def take_events(self) -> list[Event]:
        """Events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def admitted(self, request: Request) -> None:
        """A request has its memory: announce its hits, and ask for what a peer is to send."""
        self.announce(request)
        if request.state is not State.FETCHING:
            if not request.is_answer and request.num_pending == 0:
                self.finish(request, FinishReason.STOP)
        elif self._pool.has_forgotten([request.work.source]):
            self.finish(request, FinishReason.ABORTED, degraded_peer())
        else:
            size = self._scheduler.block_size
            first, end = request.num_hashed, len(request.whole_hashes(size))
            blocks, hashes, counts = self._travelling(request, first, end)
            tokens = request.tokens[: end * size]
            self._events.append(FetchEvent(request.key, first, blocks, hashes, tokens, counts))

    def emit(self, request: Request, tokens: list[int], logprobs: Sequence[TokenLogprobs]) -> None:
        """Report new tokens; the prompt's log-probabilities once they are complete."""
        prompt_logprobs: Sequence[TokenLogprobs] = ()
        if request.prompt_logprobs and request.num_scored >= request.num_to_score:
            prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, []
        if tokens or prompt_logprobs:
            counts = request.counts or self._counts(request)
            self._events.append(TokensEvent(request.key, tokens, counts, logprobs, prompt_logprobs))

    def emit_each(self, requests: Sequence[Request], tokens: Sequence[list[int]]) -> None:
        """Report new tokens of each."""
        keys = [request.key for request in requests]
        counts = [request.counts or self._counts(request) for request in requests]
        self._events += map(TokensEvent, keys, tokens, counts)

    def announce(self, request: Request) -> None:
        """Pin and report the blocks that have their hash since the last announcement."""
        first, end = request.num_announced, request.num_hashed
        if request.work.announce_from < 0 or end <= first:
            return
        blocks, hashes, _ = self._travelling(request, first, end)
        if not blocks:  # a query at the end reads none of these
            return
        self._pool.pin(blocks)
        request.num_announced = end
        self._events.append(
            AnnouncedEvent(request.key, first, blocks, hashes, self.generations(blocks))
        )

    def _travelling(
        self, request: Request, first: int, end: int
    ) -> tuple[list[int], list[bytes], list[int]]:
        """Blocks of the entries first .. end - 1 that are read behind the prompt's whole blocks.

        Returns the blocks by entry and column, their hashes, and how many each entry has. A prefill
        and a decode worker come to the same ones.
        """
        size = self._scheduler.block_size
        position = len(request.whole_hashes(size)) * size
        entries = [request.table.entry(i, position) for i in range(first, end)]
        blocks = [block for entry in entries for _, block in entry]
        hashes = [
            column_hash(request.hashes[i], column)
            for i, entry in enumerate(entries, first)
            for column, _ in entry
        ]
        return blocks, hashes, [len(entry) for entry in entries]

    def generations(self, blocks: Sequence[int]) -> list[int]:
        """Of each block, as its reader compares them."""
        return [int(g) for g in self._pool.generations[list(blocks)]]

    def finish(
        self, request: Request, reason: FinishReason, error: DiptychError | None = None
    ) -> None:
        """End a request and release all that it holds; once."""
        if request.state is State.FINISHED:
            return
        self._scheduler.remove(request)
        request.move(State.FINISHED)
        del self.requests[request.key]
        if self._scheduler.speculation is not None:
            self._scheduler.speculation.finish(request)
        counts = self._counts(request)
        self._events.append(FinishedEvent(request.key, reason, request.matched_stop, counts, error))

    def _counts(self, request: Request) -> Counts:
        """The request's counters; kept until they change, as most events have the same."""
        counts = request.counts = Counts(
            num_cached_tokens=request.num_cached_tokens,
            num_draft_tokens=request.num_draft_tokens,
            num_accepted_tokens=request.num_accepted_tokens,
            queue_s=(request.admitted_s or self._clock()) - request.arrival_s,
        )
        return counts


def degraded_peer() -> Unavailable:
    """The error of a request whose prefill worker's blocks must not be used."""
    return Unavailable("blocks of this prefill worker were not finite", lost="prefill", sick=True)
