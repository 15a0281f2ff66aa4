"""Log-probabilities in the shapes of both APIs.

completions   parallel arrays: tokens, token_logprobs, top_logprobs, text_offset
chat          one object a token: token, logprob, bytes, top_logprobs
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from coordinator.api.ranked import finite
from coordinator.text.values import Logprob, ScoredToken

ARRAYS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def _name(entry: Logprob, as_id: bool) -> str:
    return f"token_id:{entry.token_id}" if as_id else entry.text


def bytes_of(token: Logprob) -> bytes:
    """The bytes of a token, which may be a part of a character."""
    return token.raw if token.raw is not None else token.text.encode()


def completion_logprobs(
    entries: Iterable[ScoredToken], as_ids: bool, num_echoed: int = 0, first: Logprob | None = None
) -> dict[str, list[Any]]:
    """The arrays of tokens, by name.

    `num_echoed` characters of the prompt stand before the text of the entries. `first`: the first
    token of a prompt, which has no log-probability and stands before them.
    """
    rows: list[tuple[Any, ...]] = [] if first is None else [(_name(first, as_ids), None, None, 0)]
    for entry in entries:
        top: dict[str, float] = {}
        for one in (*entry.top, entry.chosen):  # of tokens with one text, the likelier
            top.setdefault(_name(one, as_ids), finite(one.logprob))
        chosen, offset = entry.chosen, num_echoed + entry.text_offset
        rows.append((_name(chosen, as_ids), finite(chosen.logprob), top, offset))
    return {name: [row[i] for row in rows] for i, name in enumerate(ARRAYS)}


def chat_logprobs(entries: Iterable[ScoredToken], as_ids: bool) -> list[dict[str, Any]]:
    """The `content` of a chat choice's logprobs."""
    return [
        {**_token(e.chosen, as_ids), "top_logprobs": [_token(one, as_ids) for one in e.top]}
        for e in entries
    ]


def _token(entry: Logprob, as_ids: bool) -> dict[str, Any]:
    return {
        "token": _name(entry, as_ids),
        "logprob": finite(entry.logprob),
        "bytes": list(bytes_of(entry)),
    }
