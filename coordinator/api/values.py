"""Requests of protocols to the frontend, without a wire format.

    GenerateRequest --frontend--> events of `coordinator.generation.events`

Requests are not checked yet. None and empty values stand for unset fields. Field names are those of
inference.proto, and errors name them (`sampling.top_p`).
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.generation.request import Resume
from coordinator.text.values import Message


@dataclass(slots=True)
class Sampling:
    """How tokens are sampled."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    default_temperature: float = 0.0  # the protocol's, where request and model name none


@dataclass(slots=True)
class Stop:
    """When an output ends."""

    max_tokens: int | None = None
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False


@dataclass(slots=True)
class Output:
    """What is sent beside the text and the tokens of an output."""

    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    skip_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class Constraint:
    """The form of an output: json_schema, json_object, regex, grammar or choice."""

    kind: str
    value: str | bool | Sequence[str]


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`mode` is none, auto or required ("": auto); `name` is that of a tool to call."""

    mode: str = ""
    name: str | None = None


@dataclass(slots=True)
class GenerateRequest:
    """A prompt (`text`, `token_ids` or `messages`) to complete; `request_id` "" makes up one."""

    request_id: str = ""
    model: str = ""
    text: str | None = None
    token_ids: Sequence[int] | None = None
    messages: Collection[Message] | None = None
    tools_json: str = ""
    template_kwargs_json: str = ""  # an object: variables of the chat template
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool = True
    sampling: Sampling = field(default_factory=Sampling)
    stop: Stop = field(default_factory=Stop)
    output: Output = field(default_factory=Output)
    constraint: Constraint | None = None
    n: int = 1
    priority: int = 0
    cache_salt: str = ""
    resume: Sequence[Resume] = ()

    def __post_init__(self) -> None:
        self.request_id = self.request_id or uuid.uuid4().hex


@dataclass(slots=True)
class TokenizeRequest:
    """`text` or `messages` to convert to token ids."""

    model: str = ""
    text: str | None = None
    add_special_tokens: bool = True
    messages: Collection[Message] | None = None
    tools_json: str = ""
    template_kwargs_json: str = ""
    add_generation_prompt: bool = True


@dataclass(frozen=True, slots=True)
class ModelCard:
    """The served model; see Model in inference.proto."""

    name: str
    max_model_len: int
    vocab_size: int
    block_size: int
    numeric_profile: str
    ready: bool
    disabled: tuple[str, ...]
    default_sampling: Mapping[str, float] = field(default_factory=dict)
    tool_format: str = ""
    reasoning_parser: str = ""
