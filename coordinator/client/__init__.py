"""The client library: what the command line uses, and what a program may.

    with Client("one:50051,two:50051") as client:
        for event in client.generate("Once upon a time", max_tokens=64, temperature=0.8):
            ...                                                  # TextDelta, ..., Done

A lost connection or coordinator is a pause: the answer goes on at another one, or at the same one
when it is back, with the next token. See docs/client.md.

    messages, turns          options, a conversation -> request
    events                   response -> what a caller gets, error -> a sentence
    stream, choice           one answer over several calls: no seam, in any of its choices
    attempts, coordinators   where to call next, and when; what a client follows
    silence                  calls that are open and bring nothing
    blocking, asynchronous   the two clients: nothing but calls and waits
"""

from __future__ import annotations

from coordinator.client.asynchronous import AsyncClient
from coordinator.client.attempts import RetryPolicy
from coordinator.client.blocking import Client
from coordinator.client.events import Done, OutputEvent, Prompt, TextDelta, describe
from coordinator.client.messages import chat_request, generate_request

__all__ = [
    "AsyncClient",
    "Client",
    "Done",
    "OutputEvent",
    "Prompt",
    "RetryPolicy",
    "TextDelta",
    "chat_request",
    "describe",
    "generate_request",
]
