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
        events = _with_reports(
            client, client.generate(prompt, timeout_s=timeout_s, **options), quiet
        )
        if (options.get("n") or 1) > 1:
            return _run_choices(server, events, quiet)
        return _run(server, events, quiet)[1]


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
            return _run(server, _with_reports(client, events, quiet), quiet)[1]
        if sys.stdin.isatty():
            print("Type a message; an empty line or Ctrl-D ends.", file=sys.stderr)
        while question := _read_line():
            messages.append({"role": "user", "content": question})
            events = client.chat(messages, timeout_s=timeout_s, **options)
            text, failed = _run(server, _with_reports(client, events, quiet), quiet)
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


def _run(server: str, events: Iterator[OutputEvent], quiet: bool) -> tuple[str, int]:
    """Stream an output to stdout; returns (its text, exit status)."""
    texts = []
    try:
        for event in events:
            if isinstance(event, TextDelta):
                texts.append(event.text)
                print(event.text, end="", flush=True)
            elif isinstance(event, Done):
                print(flush=True)
                if not quiet:
                    print(_usage(event), file=sys.stderr)
    except (DiptychError, grpc.RpcError) as error:
        if texts:
            print(flush=True)
        return "".join(texts), print_error(server, error)
    return "".join(texts), 0


def _run_choices(server: str, events: Iterator[OutputEvent], quiet: bool) -> int:
    """Print each of several outputs when it is complete; returns the exit status."""
    texts: defaultdict[int, str] = defaultdict(str)
    try:
        for event in events:
            if isinstance(event, TextDelta):
                texts[event.index] += event.text
            elif isinstance(event, Done):
                print(f"--- choice {event.index}\n{texts[event.index]}", flush=True)
                if not quiet:
                    print(_usage(event), file=sys.stderr)
    except (DiptychError, grpc.RpcError) as error:
        return print_error(server, error)
    return 0


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
