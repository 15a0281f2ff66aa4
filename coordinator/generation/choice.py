"""One choice of a request: as many attempts as it takes, read as one stream of parts.

    resumed tokens -> Dispatch.next -> DecodeClient.attempt -> chunks -> Finished
                          ^                  |
                          '------ lost ------'    again, with the tokens received so far

What is lost on the way changes nothing that the client receives: an attempt gets all tokens of the
earlier ones, and the sampler is a function of seed and position.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from coordinator.cluster.membership import Membership
from coordinator.generation.decode_call import DecodeClient
from coordinator.generation.dispatch import Dispatch
from coordinator.generation.events import Ending, Event, Finished, PromptEvent
from coordinator.generation.output import Output
from coordinator.generation.request import GenerationRequest
from coordinator.generation.shared_parts import SharedParts
from coordinator.generation.state import GenerationState
from coordinator.routing.admission import Ticket
from coordinator.routing.affinity import Affinity
from coordinator.routing.harmed_workers import Trial
from coordinator.routing.policy import Plan, Policy
from coordinator.routing.retry import Retry
from coordinator.text.detokenizer import scored_prompt
from coordinator.text.served_model import ServedModel
from coordinator.text.stops import StopSet
from coordinator.text.values import ScoredToken
from engine.base.errors import Mismatch, Unavailable, WorkersLost
from engine.base.types import FinishReason
from engine.rpc.auth import ClusterToken
from engine.telemetry.coordinator_metrics import CoordinatorMetrics
from engine.telemetry.log import get_logger
from engine.telemetry.timeline import Event as Moment
from engine.telemetry.timeline import Timeline

_log = get_logger(__name__)

SHUTTING_DOWN = "this coordinator is shutting down"


@dataclass(frozen=True, slots=True)
class Shared:
    """What the choices of a request have in common, made once."""

    prompt: list[int]  # token ids
    stops: StopSet
    parts: SharedParts
    affinity: Affinity
    ticket: Ticket
    max_model_len: int


@dataclass(eq=False)
class ChoiceRunner:
    """Generates choices. Owns the calls of decode workers; lives on the event loop."""

    model: ServedModel
    membership: Membership
    metrics: CoordinatorMetrics
    worker_wait_s: float
    policy: Policy
    token: ClusterToken | None = None
    clock: Callable[[], float] = time.monotonic
    _closed: bool = False
    _trial: Trial = field(default_factory=Trial)

    def __post_init__(self) -> None:
        self._client = DecodeClient(self.membership, self.token)
        self._catching_up = asyncio.Semaphore(1)  # one piece of it at a time, between others' work

    async def close(self) -> None:
        """Begin no more attempts, and close the channels to workers: attempts on them are lost."""
        self._closed = True
        self.membership.wake()  # choices that wait for a worker
        await self._client.close()

    def check_open(self) -> None:
        """Raise Unavailable where there are to be no more attempts."""
        if self._closed:
            raise Unavailable(SHUTTING_DOWN)

    async def run(
        self, request: GenerationRequest, shared: Shared, timeline: Timeline
    ) -> AsyncGenerator[Event, None]:
        """The prompt's part where the request returns it, chunks, then Finished.

        Raises Unavailable, WorkersLost, DeadlineExceeded, Mismatch.
        """
        output = self._new_output(request, shared)
        if request.resume.token_ids:
            await self._catch_up(output)
        if request.resume.finished and output.ending is None:
            output.ending = Ending(FinishReason.LENGTH)
        state = GenerationState(request, shared.prompt, output, shared.parts)
        dispatch = self._dispatch(shared, output)
        prompt_is_due = request.returns_prompt
        while output.ending is None:
            if not output.max_tokens and not state.scores_prompt:
                output.ending = Ending(FinishReason.LENGTH)
                break
            plan = None
            shared.ticket.activity = "waits for a worker"
            try:
                plan = await dispatch.next(state.num_tokens, alone=state.scores_prompt)
                timeline.mark(Moment.ROUTED)
                shared.ticket.activity = f"waits for tokens from {plan}"
                async with aclosing(self._client.attempt(state, plan, dispatch)) as chunks:
                    async for chunk in chunks:
                        dispatch.retry.progressed()
                        shared.ticket.activity = f"is being answered by {plan}"
                        self._observe(timeline, len(chunk.token_ids))
                        if prompt_is_due:
                            yield await self._prompt_event(state)
                            prompt_is_due = False
                        yield chunk
            except Unavailable as error:
                await self._after_loss(dispatch, plan, error, output)
            except Mismatch:
                self.metrics.migrated("other_model")
                raise
            finally:
                state.num_attempts += 1
                dispatch.retry.close()
        if prompt_is_due:
            yield await self._prompt_event(state)
        rest = output.finish()
        if not request.resume.finished and (rest.text or rest.reasoning or rest.tool_calls):
            yield rest
        timeline.mark(Moment.FINISHED)
        yield self._finished(state, timeline)

    def _new_output(self, request: GenerationRequest, shared: Shared) -> Output:
        """With its limits: beyond the room left it ends as LENGTH at the context's end."""
        room = shared.max_model_len - len(shared.prompt)
        limit = request.default_max_tokens if request.max_tokens is None else request.max_tokens
        max_tokens = room if limit is None else min(limit, room)
        return Output(
            self.model.tokenizer,
            request,
            shared.prompt,
            max_tokens=max_tokens,
            min_tokens=min(request.min_tokens, max_tokens),
            stops=shared.stops,
        )

    def _dispatch(self, shared: Shared, output: Output) -> Dispatch:
        retry = Retry(
            self.policy,
            self.membership,
            worker_wait_s=self.worker_wait_s,
            deadline_s=shared.ticket.deadline_s,
            max_tokens=len(shared.prompt) + output.max_tokens,
            affinity=shared.affinity,
            trial=self._trial,
        )
        return Dispatch(retry, self.membership, clock=self.clock, check_open=self.check_open)

    async def _catch_up(self, output: Output) -> None:
        """Take the resumed tokens, in pieces between which other requests go on."""
        pieces, is_more = output.catch_up(), True
        while is_more and output.ending is None:
            async with self._catching_up:
                is_more = next(pieces, False)
                await asyncio.sleep(0)

    async def _after_loss(
        self, dispatch: Dispatch, plan: Plan | None, error: Unavailable, output: Output
    ) -> None:
        """Returns if there may be another attempt, else raises Unavailable or WorkersLost."""
        try:
            if plan is None:  # there was no worker for it
                raise error
            self.check_open()
            await dispatch.failed(plan, error)
        except Unavailable as last:
            if plan is not None or output.num_new:
                self.metrics.migrated("exhausted")
            raise Unavailable(
                last.message, last.retry_after_s, num_emitted=output.num_new
            ) from None
        except WorkersLost as last:
            self.metrics.migrated("given_up")
            raise WorkersLost(last.message, output.num_new) from None
        self.metrics.migrated("resumed" if output.num_new else "retried")
        _log.warning(
            "attempt lost",
            worker=plan.decode.peer.worker_id,
            prefill=plan.prefill.peer.worker_id if plan.prefill else None,
            lost=error.lost or "decode",
            reason=error.message,
            num_tokens=len(output.token_ids),
        )

    async def _prompt_event(self, state: GenerationState) -> PromptEvent:
        request, prompt = state.request, state.prompt
        text = request.text if request.echo else ""
        if text is None:
            text = await self.model.decode(prompt, request.skip_special_tokens)
            text = text.removesuffix(state.output.broken_prompt_end)
        scores = state.prompt_logprobs
        scored = await asyncio.to_thread(self._scored, state, text) if scores else ()
        return PromptEvent(text, tuple(prompt), scored)

    def _scored(self, state: GenerationState, text: str) -> list[ScoredToken]:
        """The prompt's tokens with their places, of which there may be tens of thousands."""
        tokenizer, prompt, scores = self.model.tokenizer, state.prompt, state.prompt_logprobs
        skips = state.request.skip_special_tokens
        text = text or tokenizer.decode(prompt, skips)
        return list(scored_prompt(tokenizer, prompt, scores, text, skips))

    def _observe(self, timeline: Timeline, num_tokens: int) -> None:
        before = timeline.last(Moment.TOKENS)
        now = timeline.mark(Moment.TOKENS)
        self.metrics.generation_tokens.inc(num_tokens)
        if before is None:
            self.metrics.time_to_first_token_seconds.observe(
                timeline.between(Moment.ARRIVED, Moment.TOKENS)
            )
            return
        for _ in range(num_tokens):
            self.metrics.inter_token_latency_seconds.observe((now - before) / num_tokens)

    def _finished(self, state: GenerationState, timeline: Timeline) -> Finished:
        ending, timing = state.output.ending, state.timing(timeline)
        assert ending is not None, "an output that is reported has ended"
        self.metrics.e2e_request_latency_seconds.observe(
            timeline.between(Moment.ARRIVED, Moment.FINISHED)
        )
        self.metrics.request_queue_time_seconds.observe(timing.queue_s)
        self.metrics.request_succeeded(ending.reason.value)
        return Finished(replace(ending), state.usage(), timing, state.request.index)
