"""How far one output has come, over all attempts, and what it took."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from coordinator.generation.events import Delta, Timing, Usage
from coordinator.generation.output import Output
from coordinator.generation.request import GenerationRequest
from coordinator.generation.shared_parts import SharedParts
from engine.base.types import TokenLogprobs
from engine.pb.diptych.internal.v1 import worker_pb2
from engine.rpc.convert import logprobs_from_pb
from engine.telemetry.timeline import Event, Timeline

Report = worker_pb2.Tokens | worker_pb2.DecodeFinished


@dataclass(slots=True)
class GenerationState:
    """One choice of a request while it is generated."""

    request: GenerationRequest
    prompt: list[int]  # token ids
    output: Output
    shared_parts: SharedParts = field(default_factory=SharedParts)
    reports: dict[int, Report] = field(default_factory=dict)  # the last one of each attempt
    num_attempts: int = 0  # that are over; each counts from zero
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    def report(self, numbers: Report) -> None:
        """Take the running totals of the attempt in progress."""
        self.reports[self.num_attempts] = numbers

    @property
    def _first(self) -> Report:
        """The report of the first attempt that sent one."""
        return next(iter(self.reports.values()), worker_pb2.Tokens())

    async def take(self, tokens: worker_pb2.Tokens) -> Delta:
        """Add a worker's tokens and numbers."""
        self.report(tokens)
        if scores := tokens.prompt_logprobs:  # of thousands of tokens
            self.prompt_logprobs = tuple(await asyncio.to_thread(logprobs_from_pb, scores))
        return self.output.push(tokens.token_ids, logprobs_from_pb(tokens.logprobs))

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        return len(self.prompt) + len(self.output.token_ids)

    @property
    def scores_prompt(self) -> bool:
        """Whether the next attempt has to compute the prompt's log-probabilities."""
        request = self.request
        is_due = request.num_prompt_logprobs is not None and request.returns_prompt
        return is_due and not self.prompt_logprobs and len(self.prompt) > 1

    def usage(self) -> Usage:
        """The numbers of tokens, after the last attempt."""
        return Usage(
            prompt_tokens=len(self.prompt),
            completion_tokens=len(self.output.token_ids),
            cached_tokens=min(self._first.cached_tokens, len(self.prompt)),
            draft_tokens=sum(r.draft_tokens for r in self.reports.values()),
            accepted_tokens=sum(r.accepted_tokens for r in self.reports.values()),
            reasoning_tokens=self.output.num_reasoning,
        )

    def timing(self, timeline: Timeline) -> Timing:
        """Where the time went; the worker's parts are those of the first attempt."""
        first = self._first
        return Timing(
            queue_s=timeline.between(Event.ADMITTED, Event.ROUTED) + first.queue_s,
            prefill_s=first.prefill_s,
            kv_transfer_s=first.kv_transfer_s,
            first_token_s=timeline.between(Event.ARRIVED, Event.TOKENS),
            decode_s=timeline.span(Event.TOKENS),
        )
