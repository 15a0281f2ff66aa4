"""The life of one request, top to bottom.

    admit -> tokenize -> pick D and P -> D.Decode(prompt, P) -> text, stop strings -> Finished
                             ^                  |
                             +---- lost --------+    again with the tokens received so far

Whatever is lost on the way, the client's stream goes on with the next token: an attempt is given
all tokens of the earlier ones, and the sampler is a function of seed and position. Closing the
generator cancels the call of D, which cancels the call of P. `decode_call.py` is one such call.

Each of several choices goes that way by itself, on the same D: the first one's blocks of the prompt
are the others' prefix hits, and one that is lost is tried again alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from coordinator.cluster.membership import Membership
from coordinator.generation.decode_call import DecodeClient, GenerationState
from coordinator.generation.dispatch import Dispatch
from coordinator.generation.fan_in import Merge
from coordinator.generation.output import Output
from coordinator.generation.prompt import checked, prompt_of
from coordinator.generation.request import (
    Chunk,
    Ending,
    Finished,
    GenerationRequest,
    Part,
    PromptPart,
    Timing,
    Usage,
)
from coordinator.generation.shared_parts import SharedParts
from coordinator.routing.admission import Admission, Ticket
from coordinator.routing.affinity import Affinity, affinity_of
from coordinator.routing.harmed_workers import Trial
from coordinator.routing.policy import POLICIES, Plan, Policy
from coordinator.text.detokenizer import place_prompt
from coordinator.text.served_model import ServedModel
from coordinator.text.stops import StopSet
from engine.base.errors import DeadlineExceeded, InvalidRequest, Mismatch, Unavailable, WorkersLost
from engine.base.types import FinishReason
from engine.pb.diptych.internal.v1 import worker_pb2
from engine.rpc.trust import ClusterToken
from engine.telemetry.log import get_logger
from engine.telemetry.metrics import CoordinatorMetrics
from engine.telemetry.timeline import Event, Timeline

_log = get_logger(__name__)
_MANY_STOP_CHARS = 2048  # more stop strings are made ready in a thread
_SHUTTING_DOWN = "this coordinator is shutting down"


@dataclass(frozen=True, slots=True)
class Shared:
    """What the choices of a request have in common, made once."""

    prompt: list[int]  # token ids
    stops: StopSet
    parts: SharedParts


class Pipeline:
    """Answers requests. Owned by the event loop."""

    def __init__(
        self,
        model: ServedModel,
        membership: Membership,
        admission: Admission,
        metrics: CoordinatorMetrics,
        *,
        worker_wait_s: float,
        policy: Policy = POLICIES["least_loaded"],
        token: ClusterToken | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._membership = membership
        self._admission = admission
        self._metrics = metrics
        self._worker_wait_s = worker_wait_s
        self._policy = policy
        self._clock = clock
        self._caller = DecodeClient(membership, token)
        self._catching_up = asyncio.Semaphore(1)  # one piece of it at a time, between others' work
        self._trial = Trial()
        self.draining = False
        self._closed = False

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus answer: ours, or the workers' where theirs is shorter."""
        ours = self._model.max_model_len
        return min(ours, self._membership.max_model_len or ours)

    @property
    def idle(self) -> asyncio.Event:
        """Set while no request is inside."""
        return self._admission.idle

    @property
    def num_requests(self) -> int:
        """Requests inside."""
        return self._admission.num_requests

    async def close(self) -> None:
        """End the requests inside as Unavailable, and close the channels to workers."""
        self.draining = self._closed = True
        self._membership.wake()  # who waits for a worker
        await self._caller.close()

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable(_SHUTTING_DOWN)

    async def answer(
        self, request: GenerationRequest, timeline: Timeline, deadline_s: float
    ) -> AsyncGenerator[Part, None]:
        """Of each choice its chunks, then Finished; before all what the prompt was to tell.

        `deadline_s` is a moment of the monotonic clock. Raises Overloaded, InvalidRequest (prompt
        too long), Unavailable, DeadlineExceeded.
        """
        if self.draining:
            raise Unavailable(_SHUTTING_DOWN)
        count = request.num_choices
        ticket = self._admission.admit(request.request_id, deadline_s, count)
        timeline.mark(Event.ADMITTED)
        gauge = self._metrics.num_requests_waiting
        gauge.inc(count)
        try:
            request, prompt = await self._prepared(request, deadline_s)
            timeline.mark(Event.TOKENIZED)
            ticket.set_tokens(len(prompt) + sum(len(r.token_ids) for r in request.resumes))
            self._metrics.prompt_tokens.inc(len(prompt))
            decode = self._decode if count == 1 else self._decode_choices
            affinity = affinity_of(self._membership.view(), request.affinity_token)
            shared = await self._shared(request, prompt)
            answer = decode(request, shared, timeline, ticket, affinity)
            async with aclosing(answer) as parts:
                async for part in parts:
                    if gauge is self._metrics.num_requests_waiting:
                        gauge.dec(count)
                        gauge = self._metrics.num_requests_running
                        gauge.inc(count)
                    yield part
        except InvalidRequest as error:
            if error.field == "constraint" and request.tools:
                raise InvalidRequest("tools_json", error.description) from None
            raise
        finally:
            gauge.dec(count)
            ticket.release()

    async def _prepared(
        self, request: GenerationRequest, deadline_s: float
    ) -> tuple[GenerationRequest, list[int]]:
        """The request as it can be served, and its prompt."""
        try:
            async with asyncio.timeout(max(0.0, deadline_s - self._clock())):
                prompt = await prompt_of(self._model, request, self.max_model_len)
                return await checked(self._model, request, prompt), prompt
        except TimeoutError:
            raise DeadlineExceeded("the request's time ran out while it was tokenized") from None

    async def _shared(self, request: GenerationRequest, prompt: list[int]) -> Shared:
        """What all choices need; long stop strings are read in a thread."""
        strings = request.stop_strings
        names = self._model.tokenizer.special_names if strings else ()
        if sum(map(len, strings)) > _MANY_STOP_CHARS:
            stops = await asyncio.to_thread(StopSet, strings, names)
        else:
            stops = StopSet(strings, names)
        return Shared(prompt, stops, SharedParts.of(request, prompt))

    async def _decode_choices(
        self,
        request: GenerationRequest,
        shared: Shared,
        timeline: Timeline,
        ticket: Ticket,
        affinity: Affinity,
    ) -> AsyncGenerator[Part, None]:
        """All choices as they come. The failure of one, when no retry is left, ends all."""
        num_tokens = 0
        begun = asyncio.Event()  # the prompt's part, if there is one, is the first of all
        if not request.tells_prompt:
            begun.set()

        async def decode(index: int) -> None:
            if index:
                await begun.wait()
            of_choice = timeline.fork() if index else timeline
            answer = self._decode(request.choice(index), shared, of_choice, ticket, affinity)
            async with aclosing(answer) as parts:
                async for part in parts:
                    await merge.put(part)
                    begun.set()

        try:
            async with Merge[Part]() as merge:
                for index in range(request.num_choices):
                    merge.add(decode(index))
                async for part in merge:
                    num_tokens += len(part.token_ids) if isinstance(part, Chunk) else 0
                    yield part
        except Unavailable as error:
            raise Unavailable(error.message, error.retry_after_s, num_emitted=num_tokens) from None

    async def _decode(
        self,
        request: GenerationRequest,
        shared: Shared,
        timeline: Timeline,
        ticket: Ticket,
        affinity: Affinity,
    ) -> AsyncGenerator[Part, None]:
        """All attempts of one choice, as one."""
        prompt = shared.prompt
        answer = self._new_answer(request, shared)
        if request.resumed:
            await self._catch_up(answer)
        progress = GenerationState(request, prompt, answer, shared.parts)
        dispatch = Dispatch(
            self._membership,
            worker_wait_s=self._worker_wait_s,
            deadline_s=ticket.deadline_s,
            policy=self._policy,
            clock=self._clock,
            affinity=affinity,
            check_open=self._check_open,
            num_tokens=len(prompt) + answer.max_tokens,
            trial=self._trial,
        )
        tells_prompt = request.tells_prompt
        if request.resume_finished and answer.ending is None:
            answer.ending = Ending(FinishReason.LENGTH)
        while answer.ending is None:
            if not answer.max_tokens and not progress.scores_prompt:
                answer.ending = Ending(FinishReason.LENGTH)
                break
            plan = None
            ticket.doing = "waits for a worker"
            try:
                plan = await dispatch.next(progress.num_tokens, alone=progress.scores_prompt)
                timeline.mark(Event.ROUTED)
                ticket.doing = f"waits for tokens from {plan}"
                attempt = self._caller.attempt(progress, plan, dispatch)
                async with aclosing(attempt) as chunks:
                    async for chunk in chunks:
                        dispatch.progressed()
                        ticket.doing = f"is being answered by {plan}"
                        self._observe(timeline, len(chunk.token_ids))
                        if tells_prompt:
                            yield await self._prompt_part(progress)
                            tells_prompt = False
                        yield chunk
            except Unavailable as error:
                await self._next_attempt(dispatch, plan, error, answer)
            except Mismatch:
                self._metrics.migrated("other_model")
                raise
            finally:
                progress.spent.end_attempt()
                dispatch.close()
        if tells_prompt:
            yield await self._prompt_part(progress)
        rest = answer.finish()
        if not request.resume_finished and (rest.text or rest.tool_calls):
            yield rest
        timeline.mark(Event.FINISHED)
        yield self._finished(progress, timeline)

    async def _prompt_part(self, progress: GenerationState) -> PromptPart:
        request, prompt = progress.request, progress.prompt
        text = request.text if request.echo else ""
        if text is None:
            text = await self._model.decode(prompt, request.skip_special_tokens)
            text = text.removesuffix(progress.answer.broken_prompt_end)
        part = PromptPart(text, tuple(prompt), progress.prompt_logprobs)
        if not part.logprobs:
            return part
        return await asyncio.to_thread(self._placed, part, request.skip_special_tokens)

    def _placed(self, part: PromptPart, skip_special_tokens: bool) -> PromptPart:
        """With the places of its tokens, of which there may be tens of thousands."""
        tokenizer, ids = self._model.tokenizer, part.token_ids
        text = part.text or tokenizer.decode(ids, skip_special_tokens)
        placement = place_prompt(tokenizer, ids, text, skip_special_tokens)
        return replace(part, placement=placement)

    async def _next_attempt(
        self, dispatch: Dispatch, plan: Plan | None, error: Unavailable, answer: Output
    ) -> None:
        """After a lost attempt: returns if there may be another.

        Else raises Unavailable or WorkersLost.
        """
        try:
            if plan is None:  # nobody to send it to
                raise error
            self._check_open()
            await dispatch.failed(plan, error)
        except Unavailable as last:
            if plan is not None or answer.num_new:
                self._metrics.migrated("exhausted")
            raise Unavailable(
                last.message, last.retry_after_s, num_emitted=answer.num_new
            ) from None
        except WorkersLost as last:
            self._metrics.migrated("given_up")
            raise WorkersLost(last.message, answer.num_new) from None
        self._metrics.migrated("resumed" if answer.num_new else "retried")
        _log.warning(
            "attempt lost",
            worker=plan.decode.peer.worker_id,
            prefill=plan.prefill.peer.worker_id if plan.prefill else None,
            lost=error.lost or "decode",
            reason=error.message,
            num_tokens=len(answer.token_ids),
        )

    async def _catch_up(self, answer: Output) -> None:
        """Take what an earlier connection delivered, in pieces between which others go on."""
        pieces, is_more = answer.catch_up(), True
        while is_more and answer.ending is None:
            async with self._catching_up:
                is_more = next(pieces, False)
                await asyncio.sleep(0)

    def _new_answer(self, request: GenerationRequest, shared: Shared) -> Output:
        """With its limits: beyond the room left it ends as LENGTH at the context's end."""
        prompt = shared.prompt
        room = self.max_model_len - len(prompt)
        wanted = request.default_max_tokens if request.max_tokens is None else request.max_tokens
        max_tokens = room if wanted is None else min(wanted, room)
        return Output(
            self._model.tokenizer,
            request,
            prompt,
            max_tokens=max_tokens,
            min_tokens=min(request.min_tokens, max_tokens),
            stops=shared.stops,
        )

    def _observe(self, timeline: Timeline, num_tokens: int) -> None:
        before = timeline.last(Event.TOKENS)
        now = timeline.mark(Event.TOKENS)
        self._metrics.generation_tokens.inc(num_tokens)
        if before is None:
            self._metrics.time_to_first_token.observe(timeline.between(Event.ARRIVED, Event.TOKENS))
            return
        for _ in range(num_tokens):
            self._metrics.inter_token_latency.observe((now - before) / num_tokens)

    def _finished(self, progress: GenerationState, timeline: Timeline) -> Finished:
        answer, spent = progress.answer, progress.spent
        assert answer.ending is not None, "an answer that is reported has ended"
        first = spent.first or worker_pb2.Tokens()
        usage = Usage(
            prompt_tokens=len(progress.prompt),
            completion_tokens=len(answer.token_ids),
            cached_tokens=min(first.cached_tokens, len(progress.prompt)),
            draft_tokens=spent.draft_tokens,
            accepted_tokens=spent.accepted_tokens,
        )
        timing = Timing(
            queue_s=timeline.between(Event.ADMITTED, Event.ROUTED) + first.queue_s,
            prefill_s=first.prefill_s,
            kv_transfer_s=first.kv_transfer_s,
            first_token_s=timeline.between(Event.ARRIVED, Event.TOKENS),
            decode_s=timeline.span(Event.TOKENS),
        )
        self._metrics.e2e_request_latency.observe(timeline.between(Event.ARRIVED, Event.FINISHED))
        self._metrics.request_queue_time.observe(timing.queue_s)
        self._metrics.request_succeeded(answer.ending.reason.value)
        return Finished(replace(answer.ending), usage, timing, progress.request.index)
