"""How far one output has come, over all attempts, and what it took."""

from __future__ import annotations

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
class UsageTotals:
    """Numbers that workers reported of one output, summed over attempts."""

    draft_tokens: int = 0  # of the attempts that ended
    accepted_tokens: int = 0
    first: Report | None = None  # of the first attempt that reported
    last: Report | None = None  # of this attempt
    first_is_open: bool = True

    def report(self, numbers: Report) -> None:
        """Take the running totals of the attempt in progress."""
        self.last = numbers
        if self.first_is_open:
            self.first = numbers

    def end_attempt(self) -> None:
        """The attempt is over; the next one counts from zero."""
        if self.last is not None:
            self.draft_tokens += self.last.draft_tokens
            self.accepted_tokens += self.last.accepted_tokens
            self.first_is_open = False
            self.last = None


@dataclass(slots=True)
class GenerationState:
    """One choice of a request while it is generated."""

    request: GenerationRequest
    prompt: list[int]  # token ids
    output: Output
    shared_parts: SharedParts = field(default_factory=SharedParts)
    totals: UsageTotals = field(default_factory=UsageTotals)
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    def take(self, tokens: worker_pb2.Tokens) -> Delta:
        """Add tokens of a worker to the output."""
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
        first = self.totals.first or worker_pb2.Tokens()
        return Usage(
            prompt_tokens=len(self.prompt),
            completion_tokens=len(self.output.token_ids),
            cached_tokens=min(first.cached_tokens, len(self.prompt)),
            draft_tokens=self.totals.draft_tokens,
            accepted_tokens=self.totals.accepted_tokens,
        )

    def timing(self, timeline: Timeline) -> Timing:
        """Where the time went; the worker's parts are those of the first attempt."""
        first = self.totals.first or worker_pb2.Tokens()
        return Timing(
            queue_s=timeline.between(Event.ADMITTED, Event.ROUTED) + first.queue_s,
            prefill_s=first.prefill_s,
            kv_transfer_s=first.kv_transfer_s,
            first_token_s=timeline.between(Event.ARRIVED, Event.TOKENS),
            decode_s=timeline.span(Event.TOKENS),
        )
