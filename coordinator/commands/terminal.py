"""What `coordinator generate`, `chat` and `status` print: answers on stdout, the rest on stderr."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import grpc
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coordinator.client import Client, Done, OutputEvent, RetryPolicy, TextDelta, describe
from engine.base.errors import (
    ConfigError,
    DiptychError,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from engine.base.memory import shown
from engine.base.types import KVLink
from engine.pb.diptych.v1 import admin_pb2
from engine.rpc.local_token import local_token
from engine.rpc.trust import ClusterToken

_HOLDS_S = 5.0  # for a worker to say what it holds
_QUIET_S = 0.3  # without an event: the reason is looked for
_AGAIN_S = 10.0
_RETRY_POLICY = RetryPolicy(give_up_s=5.0)  # a person waits
_ASK_S = 5.0
_MIB = 1024 * 1024


def generate(
    server: str, prompt: str, timeout_s: float | None, quiet: bool, options: dict[str, Any]
) -> int:
    """Stream one completion, or print several; returns the exit status."""
    with _connect(server) as client:
        events = _watched(client, client.generate(prompt, timeout_s=timeout_s, **options), quiet)
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
    """Answer one question, or hold a conversation until the input ends."""
    messages = [{"role": "system", "content": system}] if system else []
    with _connect(server) as client:
        if question is not None:
            messages.append({"role": "user", "content": question})
            events = client.chat(messages, timeout_s=timeout_s, **options)
            return _run(server, _watched(client, events, quiet), quiet)[1]
        if sys.stdin.isatty():
            print("Type a message; an empty line or Ctrl-D ends.", file=sys.stderr)
        while question := _ask():
            messages.append({"role": "user", "content": question})
            events = client.chat(messages, timeout_s=timeout_s, **options)
            text, failed = _run(server, _watched(client, events, quiet), quiet)
            if failed:
                messages.pop()
                if not sys.stdin.isatty():
                    return failed
            else:
                messages.append({"role": "assistant", "content": text})
    return 0


def status(server: str, *, holds: bool = False, token: ClusterToken | None = None) -> int:
    """Print the pools, and what their workers hold if asked; returns the exit status."""
    with _connect(server) as client:
        try:
            model, workers = client.model(), client.workers()
        except (DiptychError, grpc.RpcError) as error:
            return _complain(server, error)
    console = Console()
    if not console.is_terminal:
        console.width = 160
    state = "ready" if model.ready else "not ready"
    console.print(
        f"[bold]{escape(model.name)}[/bold] is {state} on {server}: context {model.max_model_len},"
        f" blocks of {model.block_size} tokens",
        highlight=False,
    )
    if model.numeric_profile:
        console.print(f"numeric profile {escape(model.numeric_profile)}", highlight=False)
    if model.disabled:
        console.print(f"switched off: {escape(', '.join(model.disabled))}", highlight=False)
    console.print(_pool("prefill", workers, ("computed", "cached"), _read))
    console.print(_pool("decode", workers, ("pulled", "drafts accepted", "stale"), _written))
    if any(w.links for w in workers):
        console.print(_links(workers))
    for w in workers:
        if w.kv_pool_limit:
            size = f"{w.max_model_len:,} tokens: KV pool {shown(w.kv_pool_bytes)}"
            line = f"{w.worker_id} holds {size}, limited by {w.kv_pool_limit}"
            console.print(escape(line), highlight=False)
    if holds:
        console.print(_holds(workers, token or _found(server)))
    return 0


def drain(
    server: str, worker_id: str, deadline_s: float | None, token: ClusterToken | None = None
) -> int:
    """Wait until a worker has drained and ended; returns the exit status."""
    with _connect(server) as client:
        try:
            client.drain(worker_id, deadline_s, token=token)
        except (Unauthenticated, PermissionDenied):
            which = "no cluster token" if token is None else "another cluster's token"
            print(
                f"coordinator: {which}: give --cluster-token-file, the file that the coordinator at"
                f" {server} was started with; without one, drain on its machine and as its user",
                file=sys.stderr,
            )
            return 1
        except (DiptychError, grpc.RpcError) as error:
            return _complain(server, error)
    print(f"{worker_id} has ended")
    return 0


def _connect(server: str) -> Client:
    """A call that was lost is told with the usage, not in the middle of the text."""
    logging.getLogger("coordinator.client").setLevel(logging.ERROR)
    return Client(server, retry_policy=_RETRY_POLICY)


def _found(server: str) -> ClusterToken | None:
    """The token of these coordinators, where all run here and for this user and have the same."""
    tokens = {local_token(address.strip()) for address in server.split(",")}
    return tokens.pop() if len(tokens) == 1 else None


def _holds(workers: Sequence[admin_pb2.Worker], token: ClusterToken | None) -> Table:
    """What every worker says of itself over HTTP; request ids are shown to those with a token."""
    from engine.http.holds import HOLDS_PATH  # it imports a server's parts

    table = Table(title="holds", title_justify="left", header_style="bold")
    for name in ("worker", "kind", "owner"):
        table.add_column(name)
    for name in ("blocks", "age", "ends in"):
        table.add_column(name, justify="right")
    table.add_column("reason")
    direct = build_opener(ProxyHandler({}))  # no proxy of the environment sees the token
    for w in workers:
        try:
            url = f"http://{w.http_address}{HOLDS_PATH}"
            asked = Request(url, headers=dict(token.metadata) if token else {})
            with direct.open(asked, timeout=_HOLDS_S) as answer:
                found = json.load(answer)
        except (OSError, ValueError) as error:
            table.add_row(escape(w.worker_id), "", "", "", "", "", escape(f"unknown: {error}"))
            continue
        if unexplained := found["pool"].get("unexplained"):
            why = "[red]held, and nobody owns them: a leak[/red]"
            table.add_row(escape(w.worker_id), "unexplained", "", str(unexplained), "", "", why)
        for hold in found["holds"]:
            left_s = hold["deadline_s"]
            table.add_row(
                escape(w.worker_id),
                hold["kind"],
                escape(hold["owner"]),
                str(hold.get("num_blocks", "")),
                f"{hold['age_s']:.1f}s",
                "-" if left_s is None else f"{left_s:.1f}s",
                escape(hold["reason"]),
            )
    return table


def _links(workers: Sequence[admin_pb2.Worker]) -> Table:
    """How fast each worker reads from each of its peers, and over which lane."""
    table = Table(title="KV reads", title_justify="left", header_style="bold")
    for name in ("worker", "from", "memory", "lane"):
        table.add_column(name)
    for name in ("read", "speed"):
        table.add_column(name, justify="right")
    for w in workers:
        for pb in w.links:
            link = KVLink(pb.worker_id, pb.lane, pb.bytes_per_s, pb.num_bytes, pb.memory)
            speed = f"{link.bytes_per_s / 1e9:.1f} GB/s"
            table.add_row(
                escape(w.worker_id),
                escape(link.peer),
                "GPU" if link.memory == "VRAM" else "host",
                escape(link.lane or "unknown"),
                shown(link.num_bytes),
                f"[red]{speed}: slow for a GPU[/red]" if link.slow else speed,
            )
    return table


def _pool(
    role: str,
    workers: Sequence[admin_pb2.Worker],
    own: Sequence[str],
    cells: Callable[[admin_pb2.Worker], list[str]],
) -> Table:
    """One pool as a table; `own` and `cells` are the columns that only this role has.

    "prompts+answers": prompt tokens a step and answers at once that a worker takes from others.
    """
    table = Table(title=f"{role} workers", title_justify="left", header_style="bold")
    for name in ("worker", "state", "address"):
        table.add_column(name)
    for name in ("up", "prompts+answers", "run/wait", "KV free+cached+held", *own):
        table.add_column(name, justify="right")
    for w in workers:
        if w.role != role:
            continue
        table.add_row(
            escape(w.worker_id),
            _state(w),
            escape(w.address),
            _duration(w.uptime_s),
            f"{w.budget_prompt_tokens}+{w.budget_answers}",
            f"{w.num_running}/{w.num_waiting}",
            f"{w.free_blocks}+{w.cached_blocks}+{w.held_blocks} of {w.total_blocks}",
            *cells(w),
        )
    return table


def _state(w: admin_pb2.Worker) -> str:
    """A worker's state, and its health where that is not good; an older coordinator sends none."""
    colour = {"ready": "green", "draining": "yellow"}.get(w.state, "red")
    if w.health in ("", "ok"):
        return f"[{colour}]{w.state}[/{colour}]"
    return f"[{'red' if w.health == 'sick' else 'yellow'}]{w.state}, {escape(w.health)}[/]"


def _read(w: admin_pb2.Worker) -> list[str]:
    return [f"{w.prompt_tokens_computed} tokens", f"{w.prompt_tokens_cached} tokens"]


def _written(w: admin_pb2.Worker) -> list[str]:
    pulled, drafts = "-", "-"
    if w.blocks_pulled:
        pulled = f"{w.blocks_pulled} blocks, {w.bytes_pulled / _MIB:.0f} MiB"
        if w.pull_seconds:
            pulled += f", {w.bytes_pulled / w.pull_seconds / 1e9:.1f} GB/s"
    if w.draft_tokens:
        drafts = f"{w.accepted_tokens} of {w.draft_tokens}"
    return [pulled, drafts, str(w.stale_reads)]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f}s"
    if seconds < 3600:
        return f"{seconds / 60:.0f}m"
    return f"{seconds / 3600:.1f}h"


def _ask() -> str:
    """The next line, as UTF-8 whatever the locale; "" at the end of the input."""
    try:
        line = input("> " if sys.stdin.isatty() else "")
        return line.encode(sys.stdin.encoding, sys.stdin.errors or "strict").decode().strip()
    except EOFError:
        return ""
    except UnicodeError:
        raise ConfigError("standard input: not valid UTF-8") from None


def _watched(client: Client, events: Iterator[OutputEvent], quiet: bool) -> Iterator[OutputEvent]:
    """The events; while the first one is not there, standard error tells what is waited for."""
    begun = threading.Event()
    if not quiet:
        threading.Thread(target=_tell_of_waiting, args=(client, begun), daemon=True).start()
    try:
        for event in events:
            begun.set()
            yield event
    finally:
        begun.set()


def _tell_of_waiting(client: Client, begun: threading.Event) -> None:
    began_s, wait_s = time.monotonic(), _QUIET_S
    while not begun.wait(wait_s):
        reason = _waited_for(client)
        if reason and not begun.is_set():
            waited_s = time.monotonic() - began_s
            so_far = f", {waited_s:.0f} s" if wait_s == _AGAIN_S else ""
            print(f"coordinator: {reason}{so_far}", file=sys.stderr, flush=True)
        wait_s = _AGAIN_S


def _waited_for(client: Client) -> str:
    """What is missing for an answer; "" where one is being computed."""
    try:
        ready = client.model(timeout_s=_ASK_S).ready
    except (DiptychError, grpc.RpcError, ValueError):  # the call itself tells it; a closed client
        return ""
    return "" if ready else "waiting for a decode worker"


def _run(server: str, events: Iterator[OutputEvent], quiet: bool) -> tuple[str, int]:
    """Stream an answer to stdout; returns (its text, exit status)."""
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
        return "".join(texts), _complain(server, error)
    return "".join(texts), 0


def _run_choices(server: str, events: Iterator[OutputEvent], quiet: bool) -> int:
    """Print each of several answers when it is whole; returns the exit status."""
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
        return _complain(server, error)
    return 0


def _complain(server: str, error: Exception) -> int:
    unavailable = isinstance(error, Unavailable) and not error.num_emitted
    if unavailable and "connect" in describe(error).lower():
        print(f"coordinator: nobody answers at {server}; is one started?", file=sys.stderr)
    else:
        print(f"coordinator: {describe(error)}", file=sys.stderr)
    return 1


def _usage(done: Done) -> str:
    usage, timing = done.usage, done.timing
    rest = usage.completion_tokens - 1
    pace = f", {rest / timing.decode:.1f} tokens/s" if rest > 0 and timing.decode > 0 else ""
    more = ""
    if usage.draft_tokens:
        more = f", {usage.accepted_tokens} of {usage.draft_tokens} draft tokens accepted"
    if done.num_resumed:
        more += f", taken up again {done.num_resumed} times"
    return (
        f"[{done.finish_reason}; {usage.prompt_tokens} prompt tokens, {usage.cached_tokens} cached,"
        f" {usage.completion_tokens} tokens, first after {timing.first_token:.2f} s{pace}{more}]"
    )
