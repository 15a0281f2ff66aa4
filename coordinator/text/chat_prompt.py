"""A conversation -> the prompt's text, and the special tokens in it that are meant.

Meant are those that the template writes. What the caller wrote is text: contents, names, results
and arguments of calls, definitions of tools, and roles that are not usual ones. The conversation is
rendered twice, as it is and with the caller's characters marked (caller_text.py); as a rule both
give one text, and the marks tell the caller's characters from the template's.

A template that treats marked text otherwise (it counts bytes, say) gives two texts. Then the first
is taken if it holds nothing of the caller's that spells a special token, else the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.text.caller_text import Marks, without_surrogates
from coordinator.text.special_tokens import SpecialTokens
from engine.base.errors import InvalidRequest

# Templates build markers of these: '<|' + role + '|>'.
_ROLES = frozenset({"system", "user", "assistant", "tool", "developer"})
Turns = Sequence[Mapping[str, Any]]
Render = Callable[[Turns, Turns], str]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered conversation."""

    text: str
    meant: list[tuple[int, int]]  # [begin, end) of each special token that is one


def chat_prompt(
    render: Render,
    special: SpecialTokens,
    messages: Turns,
    tools: Turns,
    check: Callable[[str], None],
    *,
    callers_too: bool,
) -> Prompt:
    """Render a conversation; `callers_too`: special tokens in the caller's texts are meant, too.

    Raises InvalidRequest where the template refuses the conversation, or `check` its text.
    """
    text = without_surrogates(render(messages, tools))
    check(text)
    if callers_too:
        return Prompt(text, special.spelled(text))
    marks = special.marks
    marked: str | None
    try:
        rendered = render([_marked(m, marks) for m in messages], marks.mark_all(tools))
        marked = str.__str__(rendered)  # without its class
    except InvalidRequest:
        marked = None
    if marked is not None and marks.plain(marked) == text:
        return Prompt(text, special.spelled(marked))
    forged = any(special.spelled(t) for t in _strings((messages, tools)))
    if not forged and (marked is None or _same(special, text, marked)):
        return Prompt(text, special.spelled(text))
    if marked is None:
        raise InvalidRequest(
            "messages",
            "they spell special tokens, and the chat template cannot render those as text; "
            "expected messages without",
        )
    return Prompt(marks.plain(marked), special.spelled(marked))


def _same(special: SpecialTokens, text: str, marked: str) -> bool:
    """Whether two texts hold the same special tokens in the same order."""
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
