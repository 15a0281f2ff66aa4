"""`coordinator generate` and `chat`: outputs go to stdout, everything else to stderr."""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import grpc

from coordinator.client import Client, Done, OutputEvent, TextDelta
from coordinator.commands.connection import connect, print_error
from engine.base.errors import ConfigError, DiptychError

_QUIET_S = 0.3  # without an event: then the reason is looked up
_REPEAT_S = 10.0
_MODEL_S = 5.0  # timeout of that request


def generate(
    server: str, prompt: str, timeout_s: float | None, quiet: bool, options: dict[str, Any]
) -> int:
    """Stream one completion, or print several; returns the exit status."""
    with connect(server) as client:
        events = client.generate(prompt, timeout_s=timeout_s, **options)
        return _run(client, server, events, quiet, options.get("n") or 1)[1]


def chat(
    server: str,
    question: str | None,
    system: str | None,
    timeout_s: float | None,
    quiet: bool,
    options: dict[str, Any],
) -> int:
    """Answer one question, or hold a conversation until the input ends; returns the status."""
    messages = [{"role": "system", "content": system}] if system else []
    with connect(server) as client:
        if question is not None:
            messages.append({"role": "user", "content": question})
            events = client.chat(messages, timeout_s=timeout_s, **options)
            return _run(client, server, events, quiet)[1]
        if sys.stdin.isatty():
            print("Type a message; an empty line or Ctrl-D ends.", file=sys.stderr)
        while question := _read_line():
            messages.append({"role": "user", "content": question})
            events = client.chat(messages, timeout_s=timeout_s, **options)
            text, failed = _run(client, server, events, quiet)
            if failed:
                messages.pop()
                if not sys.stdin.isatty():
                    return failed
            else:
                messages.append({"role": "assistant", "content": text})
    return 0


def _read_line() -> str:
    """The next line, read as UTF-8 in any locale; "" at the end of the input."""
    try:
        line = input("> " if sys.stdin.isatty() else "")
        return line.encode(sys.stdin.encoding, sys.stdin.errors or "strict").decode().strip()
    except EOFError:
        return ""
    except UnicodeError:
        raise ConfigError("standard input: not valid UTF-8") from None


def _with_reports(
    client: Client, events: Iterator[OutputEvent], quiet: bool
) -> Iterator[OutputEvent]:
    """The events; until the first one stderr gets the reason of the wait."""
    begun = threading.Event()
    if not quiet:
        threading.Thread(target=_report_waiting, args=(client, begun), daemon=True).start()
    try:
        for event in events:
            begun.set()
            yield event
    finally:
        begun.set()


def _report_waiting(client: Client, begun: threading.Event) -> None:
    began_s, wait_s = time.monotonic(), _QUIET_S
    while not begun.wait(wait_s):
        reason = _missing(client)
        if reason and not begun.is_set():
            waited_s = time.monotonic() - began_s
            so_far = f", {waited_s:.0f} s" if wait_s == _REPEAT_S else ""
            print(f"coordinator: {reason}{so_far}", file=sys.stderr, flush=True)
        wait_s = _REPEAT_S


def _missing(client: Client) -> str:
    """The reason of a wait; "" if the output is being computed."""
    try:
        ready = client.model(timeout_s=_MODEL_S).ready
    except (DiptychError, grpc.RpcError, ValueError):  # the call fails too; or a closed client
        return ""
    return "" if ready else "waiting for a decode worker"


def _run(
    client: Client, server: str, events: Iterator[OutputEvent], quiet: bool, num_choices: int = 1
) -> tuple[str, int]:
    """Stream an output to stdout, or print each of several when it is complete.

    Returns (the text of the first one, exit status).
    """
    texts: defaultdict[int, str] = defaultdict(str)
    streams = num_choices == 1
    try:
        for event in _with_reports(client, events, quiet):
            if isinstance(event, TextDelta):
                texts[event.index] += event.text
                if streams:
                    print(event.text, end="", flush=True)
            elif isinstance(event, Done):
                whole = "" if streams else f"--- choice {event.index}\n{texts[event.index]}"
                print(whole, flush=True)
                if not quiet:
                    print(_usage(event), file=sys.stderr)
    except (DiptychError, grpc.RpcError) as error:
        if texts and streams:
            print(flush=True)
        return texts[0], print_error(server, error)
    return texts[0], 0


def _usage(done: Done) -> str:
    usage, timing = done.usage, done.timing
    rest = usage.completion_tokens - 1
    pace = f", {rest / timing.decode:.1f} tokens/s" if rest > 0 and timing.decode > 0 else ""
    more = ""
    if usage.draft_tokens:
        more = f", {usage.accepted_tokens} of {usage.draft_tokens} draft tokens accepted"
    if done.num_resumed:
        more += f", resumed {done.num_resumed} times"
    return (
        f"[{done.finish_reason}; {usage.prompt_tokens} prompt tokens, {usage.cached_tokens} cached,"
        f" {usage.completion_tokens} tokens, first after {timing.first_token:.2f} s{pace}{more}]"
    )
