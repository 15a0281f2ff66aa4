"""What the bodies of the HTTP API may hold: each option, declared once.

Reading checks bodies by these declarations (read.py), and the OpenAPI description shows them
(openapi.py). null is the same as unset. `description` completes "expected ..." in errors; ranges
under `_shown` are checked by the frontend, whose errors name the same options.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from coordinator.api.validation.request import (
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_REQUEST_ID_CHARS,
    MAX_SALT_CHARS,
)
from coordinator.api.validation.tools import MAX_TOOLS, NAME

UINT32 = 2**32 - 1
UINT64 = 2**64 - 1
MAX_PROMPTS = 1024
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def _shown(**schema: Any) -> Meta:
    return Meta(extra_json_schema=schema)


Count = Annotated[int, Meta(ge=0, le=UINT32)]
Alternatives = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Tokens = Annotated[list[Count], Meta(description="an array of whole numbers")]
Texts = Annotated[list[str], Meta(min_length=1, description="an array of at least one text")]
JsonSchema = Annotated[dict[str, Any] | bool | str, Meta(description="a JSON schema, an object")]
Biases = Annotated[dict[str, float], Meta(description="an object of token ids and numbers")]
Penalty = Annotated[float, _shown(minimum=-2, maximum=2)]
Share = Annotated[float, _shown(minimum=0, maximum=1)]
Ignored = Annotated[Any, _shown(ignored=True)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    """How a stream ends."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Ignored = None


class NamedSchema(Struct, forbid_unknown_fields=True):
    """A schema as OpenAI wraps it."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema: JsonSchema | None = None


class TextFormat(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    """Any text."""


class ObjectFormat(Struct, tag_field="type", tag="json_object", forbid_unknown_fields=True):
    """A JSON object; `schema` as llama.cpp and others take it."""

    schema: JsonSchema | None = None


class SchemaFormat(Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    """JSON that fits a schema."""

    json_schema: NamedSchema


class StructuredOutputs(Struct, forbid_unknown_fields=True):
    """vLLM's constraint, of one kind. What has the type None is refused unless it is null."""

    json: JsonSchema | None = None
    regex: str | None = None
    choice: Texts | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: None = None
    whitespace_pattern: None = None
    backend: Ignored = None
    disable_additional_properties: Ignored = None
    disable_any_whitespace: Ignored = None
    disable_fallback: Ignored = None


class CommonBody(Struct, kw_only=True):
    """Options of completions and of chat."""

    model: str | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, _shown(minimum=0)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=-1, le=UINT32)] | None = None
    min_p: Share | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, _shown(minimum=0.001, maximum=1000)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63)), _shown(maximum=UINT64)] | None = None
    logit_bias: Biases | None = None
    stop: Annotated[str | list[str], Meta(description="text or an array of texts")] | None = None
    stop_token_ids: Tokens | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Alternatives | None = None
    response_format: TextFormat | ObjectFormat | SchemaFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | None = None
    guided_regex: str | None = None
    guided_choice: Texts | None = None
    guided_grammar: str | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    cache_salt: Annotated[str, _shown(minLength=1, maxLength=MAX_SALT_CHARS)] | None = None
    request_id: Annotated[str, _shown(maxLength=MAX_REQUEST_ID_CHARS)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    reasoning_effort: str | None = None  # a variable of the chat template


_TEXTS: dict[str, Any] = {"items": {"type": "string"}, "maxItems": MAX_PROMPTS}
_IDS: dict[str, Any] = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": UINT32},
}
# Token ids, or several prompts; requests.py tells which.
Prompts = Annotated[list[Any], _shown(minItems=1, anyOf=[_TEXTS, _IDS, {**_TEXTS, "items": _IDS}])]


class CompletionBody(CommonBody, kw_only=True):
    """The body of /v1/completions."""

    prompt: Annotated[str | Prompts, Meta(description="text, token ids, or an array of either")]
    echo: bool | None = None
    logprobs: Alternatives | None = None


class Part(Struct):
    """A part of a message's content."""

    type: str | None = None
    text: str | None = None
    refusal: str | None = None


class Audio(Struct):
    """Sound that an assistant's message came with."""

    transcript: str | None = None


class Function(Struct):
    """A call of a function, or its name alone."""

    name: str | None = None
    arguments: Annotated[str | dict[str, Any], Meta(description="JSON as text")] | None = None
    input: str | None = None  # of a tool that takes plain text


class Call(Struct):
    """A tool call of an assistant's message."""

    id: str | None = None
    type: str | None = None
    function: Function | None = None
    custom: Function | None = None


Content = Annotated[str | list[Part], Meta(description="text or an array of parts")]


class ChatMessage(Struct):
    """A turn of a conversation."""

    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool", "function"],
        Meta(description=f"one of {', '.join(ROLES)}"),
    ]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    audio: Audio | None = None
    function_call: Function | None = None
    reasoning_content: str | None = None
    reasoning: Any = None
    annotations: list[Any] | None = None


Messages = Annotated[
    list[ChatMessage], Meta(min_length=1, description="an array of at least one message")
]
# What a definition holds, the frontend checks for all protocols: validation/tools.py.
_KIND = {"enum": ["function"]}
_FUNCTION = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "pattern": f"^{NAME.pattern}$"},
        "description": {"type": "string"},
        "parameters": {"type": "object"},
        "strict": {"type": "boolean"},
    },
}
_TOOL = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {"type": _KIND, "function": _FUNCTION},
}
Tools = Annotated[list[Any], _shown(maxItems=MAX_TOOLS, items=_TOOL)]


class ToolName(Struct):
    """The function that a tool is."""

    name: str | None = None


class NamedChoice(Struct):
    """A call of this tool."""

    function: ToolName | None = None
    type: Annotated[str, _shown(**_KIND)] | None = None


Choice = Annotated[
    Literal["none", "auto", "required"] | NamedChoice,
    Meta(description="none, auto, required or a function"),
]


Variables = Annotated[dict[str, Any], Meta(description="an object: variables of the template")]


class ChatBody(CommonBody, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    tools: Tools | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: Variables | None = None


class TokenizeText(Struct):
    """The body of /tokenize, of a text."""

    prompt: Annotated[str, Meta(description="text")]
    model: str | None = None
    add_special_tokens: bool | None = None


class TokenizeChat(Struct):
    """The body of /tokenize, of a conversation."""

    messages: Messages
    model: str | None = None
    tools: Tools | None = None
    chat_template_kwargs: Variables | None = None
    add_generation_prompt: bool | None = None


class DetokenizeBody(Struct):
    """The body of /detokenize."""

    tokens: Tokens
    model: str | None = None
