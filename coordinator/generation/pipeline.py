"""The life of one request, top to bottom.

    admit -> tokenize -> for each choice (choice.py): choose P and D -> D.Decode(prompt, P)
                                             -> text and stop strings -> Finished

Closing the generator cancels the call of D, which cancels the call of P. Several choices run at the
same time, on the same D: the first one's blocks of the prompt are prefix hits of the others. One
that is lost is tried again alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from coordinator.cluster.membership import Membership
from coordinator.generation.choice import SHUTTING_DOWN, ChoiceRunner, Shared
from coordinator.generation.events import Delta, Event
from coordinator.generation.fan_in import Merge
from coordinator.generation.prompt import checked, prompt_of
from coordinator.generation.request import GenerationRequest
from coordinator.generation.shared_parts import SharedParts
from coordinator.routing.admission import Admission, Ticket
from coordinator.routing.affinity import affinity_of
from coordinator.text.served_model import ServedModel
from coordinator.text.stops import StopSet
from engine.base.errors import DeadlineExceeded, InvalidRequest, Unavailable
from engine.telemetry.coordinator_metrics import CoordinatorMetrics
from engine.telemetry.timeline import Event as Moment
from engine.telemetry.timeline import Timeline

_MANY_STOP_CHARS = 2048  # more stop strings are read in a thread


@dataclass(eq=False)
class Pipeline:
    """Answers requests. Owned by the event loop."""

    model: ServedModel
    membership: Membership
    admission: Admission
    metrics: CoordinatorMetrics
    choices: ChoiceRunner
    clock: Callable[[], float] = time.monotonic
    draining: bool = False

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output: the model's, or the workers' where theirs is shorter."""
        length = self.model.max_model_len
        return min(length, self.membership.max_model_len or length)

    @property
    def idle(self) -> asyncio.Event:
        """Set while no request is inside."""
        return self.admission.idle

    @property
    def num_requests(self) -> int:
        """Requests inside."""
        return self.admission.num_requests

    async def close(self) -> None:
        """End the requests inside as Unavailable, and close the channels to workers."""
        self.draining = True
        await self.choices.close()

    async def answer(
        self, request: GenerationRequest, timeline: Timeline, deadline_s: float
    ) -> AsyncGenerator[Event, None]:
        """Of each choice its chunks, then Finished; before all the prompt's event, where asked for.

        `deadline_s` is a moment of the monotonic clock. Raises Overloaded, InvalidRequest (prompt
        too long), Unavailable, DeadlineExceeded.
        """
        if self.draining:
            raise Unavailable(SHUTTING_DOWN)
        count = request.num_choices
        ticket = self.admission.admit(request.request_id, deadline_s, count)
        timeline.mark(Moment.ADMITTED)
        gauge = self.metrics.num_requests_waiting
        gauge.inc(count)
        try:
            request, prompt = await self._prepared(request, deadline_s)
            timeline.mark(Moment.TOKENIZED)
            ticket.set_tokens(len(prompt) + sum(len(r.token_ids) for r in request.resumes))
            self.metrics.prompt_tokens.inc(len(prompt))
            shared = await self._shared(request, prompt, ticket)
            run = self.choices.run if count == 1 else self._run_choices
            async with aclosing(run(request, shared, timeline)) as events:
                async for event in events:
                    if gauge is self.metrics.num_requests_waiting:
                        gauge.dec(count)
                        gauge = self.metrics.num_requests_running
                        gauge.inc(count)
                    yield event
        except InvalidRequest as error:
            if error.field == "constraint" and request.tools and request.tools.callable:
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
            async with asyncio.timeout(max(0.0, deadline_s - self.clock())):
                prompt = await prompt_of(self.model, request, self.max_model_len)
                return await checked(self.model, request, prompt), prompt
        except TimeoutError:
            raise DeadlineExceeded("the request's time ran out while it was tokenized") from None

    async def _shared(
        self, request: GenerationRequest, prompt: list[int], ticket: Ticket
    ) -> Shared:
        """What all choices need; long stop strings are read in a thread."""
        affinity = affinity_of(self.membership.view(), request.affinity_token)
        strings = request.stop_strings
        names = self.model.tokenizer.special_names if strings else ()
        if sum(map(len, strings)) > _MANY_STOP_CHARS:
            stops = await asyncio.to_thread(StopSet, strings, names)
        else:
            stops = StopSet(strings, names)
        parts = SharedParts.of(request, prompt)
        return Shared(prompt, stops, parts, affinity, ticket, self.max_model_len)

    async def _run_choices(
        self, request: GenerationRequest, shared: Shared, timeline: Timeline
    ) -> AsyncGenerator[Event, None]:
        """All choices as they come. The failure of one, when no retry is left, ends all."""
        num_tokens = 0
        begun = asyncio.Event()  # the prompt's event, if there is one, is the first of all
        if not request.returns_prompt:
            begun.set()

        async def run(index: int) -> None:
            if index:
                await begun.wait()
            of_choice = timeline.fork() if index else timeline
            choice = self.choices.run(request.choice(index), shared, of_choice)
            async with aclosing(choice) as events:
                async for event in events:
                    await merge.put(event)
                    begun.set()

        try:
            async with Merge[Event]() as merge:
                for index in range(request.num_choices):
                    merge.add(run(index))
                async for event in merge:
                    num_tokens += len(event.token_ids) if isinstance(event, Delta) else 0
                    yield event
        except Unavailable as error:
            raise Unavailable(error.message, error.retry_after_s, num_emitted=num_tokens) from None
