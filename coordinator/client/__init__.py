"""The client library, for programs and the command line.

    with Client("one:50051,two:50051") as client:
        for event in client.generate("Once upon a time", max_tokens=64, temperature=0.8):
            ...                                                  # TextDelta, ..., Done

If a connection or coordinator is lost, the output continues with the next token at another
coordinator, or at the same one when it is back. See docs/client.md.

    messages, chat_messages  options, a conversation -> request
    events                   response -> event, error -> sentence
    stream, choice           one output over several calls, without gaps or repetitions
    attempts                 which coordinator to call next, and when
    silence_monitor          cancels calls that bring no messages
    base                     connections, and what else the two clients share
    blocking, asynchronous   the two clients, which only call and wait
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
