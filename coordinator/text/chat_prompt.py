"""Renders a conversation to the prompt's text, and finds the special tokens of the template.

Only special tokens that the template writes are read as such. Everything from the client is text:
contents, names, results and arguments of calls, tool definitions, and unusual roles. The
conversation is rendered twice, plain and with the client's characters marked (untrusted_text.py).
Usually both give one text, and the marks distinguish the client's characters.

A template that treats marked text differently (it counts bytes, for example) gives two texts. Then
the plain one is used if no client text looks like a special token, otherwise the marked one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.text.chat_template import Messages
from coordinator.text.special_tokens import SpecialTokens
from coordinator.text.untrusted_text import Marks, without_surrogates
from engine.base.errors import InvalidRequest

# Templates build special tokens from these roles: '<|' + role + '|>'.
_ROLES = frozenset({"system", "user", "assistant", "tool", "developer"})
Render = Callable[[Messages, Messages, Mapping[str, Any]], str]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered conversation."""

    text: str
    special_spans: list[tuple[int, int]]  # [begin, end) of each text to read as a special token


def chat_prompt(
    render: Render,
    special: SpecialTokens,
    messages: Messages,
    tools: Messages,
    check: Callable[[str], None],
    *,
    parse_all: bool,
    kwargs: Mapping[str, Any] | None = None,
) -> Prompt:
    """Render a conversation; `parse_all`: read special tokens in the client's texts too.

    `kwargs` are variables of the template, of the client too.

    `check` checks the text. Raises InvalidRequest if it or the template refuses the conversation.
    """
    kwargs = kwargs or {}
    text = without_surrogates(render(messages, tools, kwargs))
    check(text)
    if parse_all:
        return Prompt(text, special.spelled(text))
    marks = special.marks
    marked: str | None
    try:
        marked_kwargs = {name: marks.mark_all(value) for name, value in kwargs.items()}
        marked_messages = [_marked(m, marks) for m in messages]
        rendered = render(marked_messages, marks.mark_all(tools), marked_kwargs)
        marked = str.__str__(rendered)  # without its class
    except InvalidRequest:
        marked = None
    if marked is not None and marks.plain(marked) == text:
        return Prompt(text, special.spelled(marked))
    forged = any(special.spelled(t) for t in _strings((messages, tools, kwargs)))
    if not forged and (marked is None or _same(special, text, marked)):
        return Prompt(text, special.spelled(text))
    if marked is None:
        raise InvalidRequest(
            "messages",
            "they contain special tokens, which this chat template cannot render as text; "
            "expected messages without special tokens",
        )
    return Prompt(marks.plain(marked), special.spelled(marked))


def _same(special: SpecialTokens, text: str, marked: str) -> bool:
    """Whether two texts contain the same special tokens in the same order."""
    one = [text[begin:end] for begin, end in special.spelled(text)]
    return one == [marked[begin:end] for begin, end in special.spelled(marked)]


def _marked(message: Mapping[str, Any], marks: Marks) -> dict[str, Any]:
    role = message["role"]
    rest = {k: marks.mark_all(v) for k, v in message.items() if k != "role"}
    return {"role": role if role in _ROLES else marks.mark(role), **rest}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield without_surrogates(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)
