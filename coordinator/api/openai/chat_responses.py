"""Events -> the responses of /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from coordinator.api.openai.logprobs import chat_logprobs
from coordinator.api.openai.options import Call
from coordinator.api.openai.responses import Choice, Writer, joined, reason_of, replaced
from coordinator.api.ranked import ranked
from coordinator.generation.events import Delta, Event, Finished, PromptEvent
from coordinator.text.values import ToolCallPiece


class ChatWriter(Writer):
    """See Writer."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, call: Call, **head: Any) -> None:
        super().__init__(call, **head)
        (request,) = call.requests
        self._has_tools = bool(request.tools_json)
        self._named_tool = (
            request.tool_choice.name is not None
        )  # a named tool's call ends with "stop"
        self._begun: set[int] = set()
        self._calling: set[int] = set()  # choices that call a tool
        self._prompt_logprobs: list[dict[str, Any] | None] | None = None

    def choices(self, prompt: int, event: Event, first_text: str = "") -> list[Choice]:
        """See Writer; the first chunk of a choice brings its role."""
        match event:
            case PromptEvent():
                if self.call.body.prompt_logprobs is not None:
                    self._prompt_logprobs = [None, *map(ranked, event.logprobs)]
                return []
            case Delta():
                return self._delta(event)
            case Finished():
                return self._finished(event)

    def _delta(self, delta: Delta) -> list[Choice]:
        index = delta.index
        self.usage.wrote(index, len(delta.token_ids))
        out = self._role(index)
        content: dict[str, Any] = {}
        if delta.text or not self._has_tools:
            content["content"] = delta.text
        if delta.tool_calls:
            self._calling.add(index)
            content["tool_calls"] = [_tool_call(piece) for piece in delta.tool_calls]
        choice = _choice(index, content)
        if self.call.logprobs is not None:
            tokens = chat_logprobs(delta.logprobs, self.names_by_id)
            choice["logprobs"] = {"content": tokens, "refusal": None}
        if self.shows_ids:
            choice["token_ids"] = list(delta.token_ids)
        if content or choice["logprobs"] or "token_ids" in choice:
            out.append(choice)
        return out

    def _finished(self, finished: Finished) -> list[Choice]:
        index = finished.index
        self.usage.finished(0, index, finished.usage)
        choice = _choice(index, {})
        reason = reason_of(finished)
        if reason == "stop" and index in self._calling and not self._named_tool:
            reason = "tool_calls"
        choice["finish_reason"] = reason
        choice["stop_reason"] = self.stop_reason(finished)
        return [*self._role(index), choice]

    def _role(self, index: int) -> list[Choice]:
        if index in self._begun:
            return []
        self._begun.add(index)
        return [_choice(index, {"role": "assistant", "content": ""})]

    def chunk(self, choices: list[Choice], *, last: bool = False) -> dict[str, Any]:
        """See Writer; the first one brings the prompt's tokens."""
        out = super().chunk(choices, last=last)
        if self.shows_ids and self.prompt_ids is not None:
            out["prompt_token_ids"] = list(self.prompt_ids[0])
            self.prompt_ids = None
        return out

    def whole(self, choices: dict[int, Choice]) -> dict[str, Any]:
        """See Writer."""
        for choice in choices.values():
            message = choice["message"]
            if "tool_calls" in message and not message["content"]:
                message["content"] = None
        out = super().whole(choices)
        if self._prompt_logprobs is not None:
            out["prompt_logprobs"] = self._prompt_logprobs
        if self.shows_ids and self.prompt_ids is not None:
            out["prompt_token_ids"] = list(self.prompt_ids[0])
        return out

    def fold(self, whole: Choice | None, part: Choice) -> Choice:
        """See Writer."""
        if whole is None:
            message = {"role": "assistant", "content": "", "refusal": None}
            whole = {**_choice(part["index"], {}), "message": message}
            del whole["delta"]
        delta, message = part["delta"], whole["message"]
        message["content"] += delta.get("content") or ""
        for piece in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if piece["index"] == len(calls):
                calls.append({key: piece[key] for key in ("id", "type", "function")})
            else:
                calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
        if part["logprobs"] is not None:
            before = whole["logprobs"]["content"] if whole["logprobs"] else []
            entries = before + part["logprobs"]["content"]
            whole["logprobs"] = {"content": entries, "refusal": None}
        joined(whole, part, "token_ids")
        replaced(whole, part, "finish_reason", "stop_reason")
        return whole


def _choice(index: int, delta: dict[str, Any]) -> Choice:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _tool_call(piece: ToolCallPiece) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": piece.arguments}
    if not piece.name:
        return {"index": piece.index, "function": function}
    function = {"name": piece.name, **function}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": function}
