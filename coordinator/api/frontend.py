"""The one interface behind all protocols, called in this process and with values.

    gRPC ------.
    OpenAI ----+--> Frontend --check--> Pipeline --events-->
    OIP -------+        |
    vLLM ------'        '-- request id in log lines, deadline, counters, admission of texts

Closing the generator of `generate` cancels the request, down to its workers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from coordinator.api.switches import Switches
from coordinator.api.validation.request import (
    MAX_CHOICES,
    MAX_DETOKENIZED,
    check_messages,
    check_model,
    check_token_ids,
    validate,
)
from coordinator.api.validation.template_kwargs import check_template_kwargs
from coordinator.api.validation.tools import check_tools
from coordinator.api.values import GenerateRequest, ModelCard, TokenizeRequest
from coordinator.cluster.membership import Membership
from coordinator.generation.events import Event, Finished
from coordinator.generation.pipeline import Pipeline
from coordinator.generation.request import GenerationRequest
from coordinator.routing.admission import Admission
from coordinator.text.served_model import ServedModel
from engine.base.errors import DiptychError, InvalidRequest
from engine.base.types import Role
from engine.rpc.status import to_status
from engine.telemetry.coordinator_metrics import CoordinatorMetrics
from engine.telemetry.log import bind_request, get_logger
from engine.telemetry.timeline import Event as Moment
from engine.telemetry.timeline import Timeline

_log = get_logger(__name__)

_AT_ONCE = 4 << 10  # characters or elements checked on the event loop: half a millisecond
_TOKENIZING_AT_ONCE = 2  # of the tokenizer's threads: the others are for requests
_CHARS_A_TOKEN = 4  # about: what a text counts as before it is tokenized

Events = AsyncGenerator[Event, None]


@dataclass(kw_only=True, eq=False)
class Frontend:
    """What protocols call; owned by the event loop.

    `left_s` is the caller's deadline in seconds; None: no deadline. Errors are DiptychErrors; those
    that name a field name it as inference.proto does.
    """

    served: ServedModel
    pipeline: Pipeline
    membership: Membership
    metrics: CoordinatorMetrics
    max_request_s: float
    tokenizing: Admission  # of calls of tokenize and detokenize, apart from requests
    switches: Switches
    _slots: asyncio.Semaphore = field(
        default_factory=partial(asyncio.Semaphore, _TOKENIZING_AT_ONCE)
    )

    async def generate(self, request: GenerateRequest, left_s: float | None = None) -> Events:
        """Generate: the prompt's event, then those of each choice, with Finished as the last one.

        Logs how the request ended, and counts it where it failed. Raises InvalidRequest, NotFound,
        NotOffered, Overloaded, Unavailable, WorkersLost, Mismatch, DeadlineExceeded.
        """
        timeline = Timeline()
        arrived_s = timeline.mark(Moment.ARRIVED)
        deadline_s = arrived_s + self._limit_s(left_s)
        code = "cancelled"  # until an end is reached
        try:
            checked = await self._checked(request)
            bind_request(checked.request_id)
            async with aclosing(self.pipeline.answer(checked, timeline, deadline_s)) as events:
                num_open = checked.num_choices
                async for event in events:
                    num_open -= isinstance(event, Finished)
                    if not num_open:  # many clients read no further
                        code = "ok"
                    yield event
        except DiptychError as error:
            code = to_status(error).code.name.lower()
            raise
        except Exception:
            code = "internal"
            raise
        finally:
            if code != "ok":
                self.metrics.request_failed(code)
            _log.info("request ended", code=code, timeline=timeline.as_dict())

    async def tokenize(self, request: TokenizeRequest, left_s: float | None = None) -> list[int]:
        """Token ids of a text or of a rendered conversation.

        Raises InvalidRequest, NotFound, NotOffered, Overloaded.
        """
        limits, longest = self.served.limits, self.pipeline.max_model_len
        check_model(request.model, limits)
        if request.text is not None:
            special = request.add_special_tokens
            async with self._admitted(len(request.text) // _CHARS_A_TOKEN, left_s):
                return await self.served.encode("text", request.text, special, longest)
        if request.messages is None:
            raise InvalidRequest("input", "unset; expected text or chat")
        field, source = "chat.tools_json", request.tools_json
        self.switches.check_tools(field, bool(source))
        size = len(source) + sum(len(message.content or "") for message in request.messages)
        async with self._admitted(size // _CHARS_A_TOKEN, left_s):
            messages = check_messages("chat.messages", request.messages, limits)
            tools = await asyncio.to_thread(check_tools, field, source)
            name = "chat.template_kwargs_json"
            return await self.served.encode_chat(
                messages,
                longest,
                tools,
                request.add_generation_prompt,
                "chat.messages",
                check_template_kwargs(name, request.template_kwargs_json),
            )

    async def detokenize(
        self,
        token_ids: Sequence[int],
        model: str = "",
        *,
        skip_special_tokens: bool = False,
        left_s: float | None = None,
    ) -> str:
        """Text of token ids. Raises InvalidRequest, NotFound, Overloaded."""
        check_model(model, self.served.limits)
        async with self._admitted(len(token_ids), left_s):
            ids = check_token_ids("token_ids", token_ids, self.served.limits, MAX_DETOKENIZED)
            return await self.served.decode(ids, skip_special_tokens)

    def model(self, name: str = "") -> ModelCard:
        """The model of that name, or the only one. Raises NotFound."""
        check_model(name, self.served.limits)
        identity, limits = self.membership.identity, self.served.limits
        return ModelCard(
            name=self.served.name,
            max_model_len=self.pipeline.max_model_len,
            vocab_size=limits.vocab_size,
            block_size=identity.block_size if identity else 0,
            numeric_profile=identity.numeric_profile if identity else "",
            ready=self.membership.ready(Role.DECODE),
            disabled=self.switches.off,
            default_sampling=limits.sampling.values(),
            tool_format=limits.tool_format.name,
            reasoning_parser=limits.reasoning.name if limits.reasoning else "none",
        )

    def _limit_s(self, left_s: float | None) -> float:
        return self.max_request_s if left_s is None else left_s

    @asynccontextmanager
    async def _admitted(self, num_tokens: int, left_s: float | None) -> AsyncIterator[None]:
        """Hold admission while a text of about `num_tokens` is converted. Raises Overloaded."""
        ticket = self.tokenizing.admit(deadline_s=time.monotonic() + self._limit_s(left_s))
        try:
            ticket.set_tokens(max(1, num_tokens))
            async with self._slots:
                yield
        finally:
            ticket.release()

    async def _checked(self, request: GenerateRequest) -> GenerationRequest:
        """The checked request. Raises what `validate` raises, and NotOffered."""
        self.switches.check(request)
        if request.tools_json or _num_checked(request) > _AT_ONCE:  # schemas take long
            return await asyncio.to_thread(validate, request, self.served.limits)
        return validate(request, self.served.limits)


def _num_checked(request: GenerateRequest) -> int:
    """Roughly how many characters of JSON and elements of lists the checks look at."""
    num = len(request.sampling.logit_bias) + len(request.stop.stop_token_ids)
    if request.constraint and isinstance(request.constraint.value, str):
        num += len(request.constraint.value)
    num += sum(len(entry.token_ids) for entry in islice(request.resume, MAX_CHOICES))
    num += len(request.token_ids or ()) + len(request.messages or ())
    for message in islice(request.messages or (), _AT_ONCE):
        num += sum(len(call.arguments) for call in message.tool_calls)
    return num
