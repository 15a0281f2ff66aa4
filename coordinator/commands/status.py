"""`coordinator status` and `drain`: prints the workers, their KV links and their holds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from urllib.request import ProxyHandler, Request, build_opener

import grpc
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coordinator.commands.connection import connect, print_error
from engine.base.errors import DiptychError, PermissionDenied, Unauthenticated
from engine.base.memory import readable_size
from engine.base.types import KVLink
from engine.pb.diptych.v1 import admin_pb2
from engine.rpc.auth import ClusterToken
from engine.rpc.convert import from_pb
from engine.rpc.local_token import local_token

_HOLDS_S = 5.0  # timeout of a worker's /debug/holds
_MIB = 1024 * 1024


def status(server: str, *, holds: bool = False, token: ClusterToken | None = None) -> int:
    """Print the pools, and with `holds` what their workers hold; returns the exit status."""
    with connect(server) as client:
        try:
            model, workers = client.model(), client.workers()
        except (DiptychError, grpc.RpcError) as error:
            return print_error(server, error)
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
    console.print(_pool_table("prefill", workers, ("computed", "cached"), _prefill_cells))
    console.print(
        _pool_table("decode", workers, ("pulled", "drafts accepted", "stale"), _decode_cells)
    )
    if any(w.links for w in workers):
        console.print(links_table(workers))
    for w in workers:
        if w.kv_pool_limit:
            size = f"{w.max_model_len:,} tokens: KV pool {readable_size(w.kv_pool_bytes)}"
            line = f"{w.worker_id} holds {size}, limited by {w.kv_pool_limit}"
            console.print(escape(line), highlight=False)
    if holds:
        console.print(_holds_table(workers, token or _local_token(server)))
    return 0


def drain(
    server: str, worker_id: str, deadline_s: float | None, token: ClusterToken | None = None
) -> int:
    """Wait until a worker has drained and ended; returns the exit status."""
    with connect(server) as client:
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
            return print_error(server, error)
    print(f"{worker_id} has ended")
    return 0


def _local_token(server: str) -> ClusterToken | None:
    """The token of these coordinators, if all run here as this user and share one."""
    tokens = {local_token(address.strip()) for address in server.split(",")}
    return tokens.pop() if len(tokens) == 1 else None


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """An empty table with columns that are aligned left, then right."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def _holds_table(workers: Sequence[admin_pb2.Worker], token: ClusterToken | None) -> Table:
    """The holds of all workers, read over HTTP; with a token it shows request ids."""
    from engine.http.holds import HOLDS_PATH  # imports a server's parts

    table = _table("holds", ("worker", "kind", "owner"), ("blocks", "age", "ends in"))
    table.add_column("reason")
    direct = build_opener(ProxyHandler({}))  # the token must not go through a proxy
    for w in workers:
        try:
            url = f"http://{w.http_address}{HOLDS_PATH}"
            request = Request(url, headers=dict(token.metadata) if token else {})
            with direct.open(request, timeout=_HOLDS_S) as response:
                found = json.load(response)
        except (OSError, ValueError) as error:
            table.add_row(escape(w.worker_id), "", "", "", "", "", escape(f"unknown: {error}"))
            continue
        if unexplained := found["pool"].get("unexplained"):
            why = "[red]held without an owner: a leak[/red]"
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


def links_table(workers: Sequence[admin_pb2.Worker]) -> Table:
    """The speed and lane of each worker's reads from its peers."""
    table = _table("KV reads", ("worker", "from", "memory", "lane"), ("read", "speed"))
    for w in workers:
        for pb in w.links:
            link = from_pb(KVLink, pb)
            speed = f"{link.bytes_per_s / 1e9:.1f} GB/s"
            table.add_row(
                escape(w.worker_id),
                escape(link.worker_id),
                "GPU" if link.memory == "VRAM" else "host",
                escape(link.lane or "unknown"),
                readable_size(link.num_bytes),
                f"[red]{speed}: slow for a GPU[/red]" if link.slow else speed,
            )
    return table


def _pool_table(
    role: str,
    workers: Sequence[admin_pb2.Worker],
    own: Sequence[str],
    cells: Callable[[admin_pb2.Worker], list[str]],
) -> Table:
    """One pool as a table; `own` and `cells` are the columns of this role only.

    "prompts+answers" are the role budgets: prompt tokens a step, and concurrent outputs.
    """
    table = _table(
        f"{role} workers",
        ("worker", "state", "address"),
        ("up", "prompts+answers", "run/wait", "KV free+cached+held", *own),
    )
    for w in workers:
        if w.role != role:
            continue
        table.add_row(
            escape(w.worker_id),
            state_cell(w),
            escape(w.address),
            _duration(w.uptime_s),
            f"{w.budget_prompt_tokens}+{w.budget_answers}",
            f"{w.num_running}/{w.num_waiting}",
            f"{w.free_blocks}+{w.cached_blocks}+{w.held_blocks} of {w.total_blocks}",
            *cells(w),
        )
    return table


def state_cell(w: admin_pb2.Worker) -> str:
    """A worker's state, and its health unless it is good or unknown (older coordinators)."""
    colour = {"ready": "green", "draining": "yellow"}.get(w.state, "red")
    if w.health in ("", "ok"):
        return f"[{colour}]{w.state}[/{colour}]"
    return f"[{'red' if w.health == 'sick' else 'yellow'}]{w.state}, {escape(w.health)}[/]"


def _prefill_cells(w: admin_pb2.Worker) -> list[str]:
    return [f"{w.prompt_tokens_computed} tokens", f"{w.prompt_tokens_cached} tokens"]


def _decode_cells(w: admin_pb2.Worker) -> list[str]:
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
