"""Public messages -> values. A field that is set keeps its name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

from coordinator.api import values
from coordinator.generation.request import Resume
from coordinator.text.values import Message, ToolCall
from engine.pb.diptych.v1 import inference_pb2 as pb

_MODES = {n: name.removeprefix("MODE_").lower() for name, n in pb.ToolChoice.Mode.items()}
_MODES[pb.ToolChoice.MODE_UNSPECIFIED] = ""


class _Messages(Collection[Message]):
    """Converted as they are read, so that a refusal of too many of them costs little."""

    def __init__(self, messages: Collection[pb.Message]) -> None:
        self._messages = messages

    def __len__(self) -> int:
        return len(self._messages)

    def __iter__(self) -> Iterator[Message]:
        return map(_message, self._messages)

    def __contains__(self, message: object) -> bool:
        return message in list(self)


def _set(message: Any) -> dict[str, Any]:
    return {field.name: value for field, value in message.ListFields()}


def _message(message: pb.Message) -> Message:
    fields = _set(message)
    if calls := fields.get("tool_calls"):
        fields["tool_calls"] = [ToolCall(call.id, call.name, call.arguments) for call in calls]
    return Message(**fields)


def _constraint(constraint: pb.Constraint) -> values.Constraint | None:
    kind = constraint.WhichOneof("kind")
    if kind is None:
        return None
    value = constraint.choice.choices if kind == "choice" else getattr(constraint, kind)
    return values.Constraint(kind, value)


def _tool_choice(choice: pb.ToolChoice) -> values.ToolChoice:
    if choice.WhichOneof("kind") == "name":
        return values.ToolChoice(name=choice.name)
    return values.ToolChoice(_MODES.get(choice.mode, str(choice.mode)))


_CONVERT: dict[str, Callable[[Any], Any]] = {
    "token_ids": lambda message: message.ids,
    "messages": _Messages,
    "tool_choice": _tool_choice,
    "sampling": lambda message: values.Sampling(**_set(message)),
    "stop": lambda message: values.Stop(**_set(message)),
    "output": lambda message: values.Output(**_set(message)),
    "constraint": _constraint,
    "resume": lambda entries: [Resume(**_set(entry)) for entry in entries],
}


def read_request(request: pb.GenerateRequest | pb.ChatRequest) -> values.GenerateRequest:
    """The request of a call of Generate or Chat."""
    fields = _set(request)
    fields.pop("alive", None)
    if isinstance(request, pb.ChatRequest):
        fields.setdefault("messages", ())
    same = lambda value: value  # noqa: E731
    return values.GenerateRequest(
        **{k: _CONVERT.get(k, same)(value) for k, value in fields.items()}
    )


def read_tokenize(request: pb.TokenizeRequest) -> values.TokenizeRequest:
    """The request of a call of Tokenize."""
    fields = _set(request)
    if chat := fields.pop("chat", None):
        fields |= {"messages": (), **_set(chat)}
        fields["messages"] = _Messages(chat.messages)
    return values.TokenizeRequest(**fields)
