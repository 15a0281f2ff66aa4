"""Events -> the responses of /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from coordinator.api.openai.responses import Choice, Writer
from coordinator.api.ranked import finite, ranked
from coordinator.generation.events import Delta, Event, Finished, PromptEvent
from coordinator.text.values import Logprob, ToolCallPiece

_CONTENT = ("delta", "logprobs", "finish_reason")  # of a choice that is sent


class ChatWriter(Writer):
    """See Writer."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __post_init__(self) -> None:
        super().__post_init__()
        (self._request,) = self.call.requests
        self._begun: set[int] = set()
        self._calling: set[int] = set()  # choices that call a tool
        self._prompt_logprobs: list[dict[str, Any] | None] | None = None

    def choices(self, prompt: int, event: Event, first_text: str = "") -> list[Choice]:
        """See Writer; the first chunk of a choice brings its role."""
        found = []
        for choice in super().choices(prompt, event, first_text):
            index = choice["index"]
            if index not in self._begun:
                self._begun.add(index)
                found.append({**self._bare(index), "delta": {"role": "assistant", "content": ""}})
            if any(choice[key] for key in _CONTENT) or "token_ids" in choice:
                found.append(choice)
        return found

    def _bare(self, index: int) -> Choice:
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": None}

    def _of_prompt(self, prompt: int, event: PromptEvent, first_text: str) -> list[Choice]:
        if self.call.body.prompt_logprobs is not None:
            self._prompt_logprobs = [None, *map(ranked, event.logprobs)]
        return []

    def _of_delta(self, index: int, delta: Delta) -> Choice:
        choice = self._bare(index)
        if delta.text or not (self._request.tools_json or delta.reasoning):
            choice["delta"]["content"] = delta.text
        if delta.reasoning:
            choice["delta"]["reasoning_content"] = delta.reasoning
        if delta.tool_calls:
            self._calling.add(index)
            choice["delta"]["tool_calls"] = [_tool_call(piece) for piece in delta.tool_calls]
        if self.call.logprobs is not None:
            tokens = [
                {**self._token(e.chosen), "top_logprobs": [self._token(one) for one in e.top]}
                for e in delta.logprobs
            ]
            choice["logprobs"] = {"content": tokens, "refusal": None}
        return choice

    def _token(self, entry: Logprob) -> dict[str, Any]:
        """A token's log-probability; its bytes may be a part of a character."""
        raw = entry.text.encode() if entry.raw is None else entry.raw
        logprob = finite(entry.logprob)
        return {"token": self.name_of(entry), "logprob": logprob, "bytes": list(raw)}

    def _reason(self, index: int, finished: Finished) -> str:
        reason = super()._reason(index, finished)
        is_named = self._request.tool_choice.name is not None  # its call ends with "stop"
        calls = reason == "stop" and index in self._calling and not is_named
        return "tool_calls" if calls else reason

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

    def _whole(self, index: int) -> Choice:
        message = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": None}

    def _add(self, whole: Choice, part: Choice) -> None:
        delta, message = part["delta"], whole["message"]
        message["content"] += delta.get("content") or ""
        if reasoning := delta.get("reasoning_content"):
            message["reasoning_content"] = message.get("reasoning_content", "") + reasoning
        for call in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            calls.append({key: call[key] for key in ("id", "type", "function")})
        if part["logprobs"] is not None:
            before = whole["logprobs"]["content"] if whole["logprobs"] else []
            entries = before + part["logprobs"]["content"]
            whole["logprobs"] = {"content": entries, "refusal": None}


def _tool_call(piece: ToolCallPiece) -> dict[str, Any]:
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": function}
