"""Run clients against one stack and print what came of it.

    python -m tests.ecosystem                          all, against a stack of their own
    python -m tests.ecosystem --only tritonclient,guidellm
    python -m tests.ecosystem --grpc 127.0.0.1:50051 --http 127.0.0.1:8000

The exit status is 1 if one fails. A client that cannot be installed here is left out, and said so.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import tests.ecosystem
from coordinator.client import Client as DiptychClient
from engine.checkpoint.packaged import DEFAULT_MODEL
from engine.checkpoint.source import resolve
from tests.ecosystem.client import Client, Target
from tests.ecosystem.environments import Failed, LeftOut
from tests.support.stack import Stack


@dataclass(frozen=True)
class Row:
    """What came of one client."""

    client: str
    version: str
    did: str
    result: str  # "passed", "failed" or "left out"
    seconds: float


def clients() -> dict[str, Client]:
    """All clients by name, in the order of their modules."""
    found = {}
    for module in pkgutil.iter_modules(tests.ecosystem.__path__):
        if module.name.startswith("__"):
            continue
        client = getattr(importlib.import_module(f"tests.ecosystem.{module.name}"), "CLIENT", None)
        if isinstance(client, Client):
            found[client.name] = client
    return found


@contextmanager
def target(grpc: str, http: str, model: str) -> Iterator[Target]:
    """The stack at those addresses, or one of `coordinator start` for as long as it is needed."""
    folder = resolve(model).folder
    if grpc and http:
        with DiptychClient(grpc) as client:
            yield Target(grpc, http, client.model().name, folder)
        return
    with (
        tempfile.TemporaryDirectory(prefix="ecosystem-") as logs,
        Stack(Path(logs), "--model", model) as stack,
    ):
        yield Target(stack.address, stack.http_address, stack.client.model().name, folder)
        stack.assert_at_rest()


def prepare(wanted: Sequence[Client]) -> int:
    """Make the environments; returns the exit status."""
    for client in wanted:
        try:
            print(f"ecosystem: {client.name}: {client.prepare().python}")
        except LeftOut as error:
            print(f"ecosystem: {client.name}: {error}")
    return 0


def try_client(client: Client, where: Target) -> Row:
    """One client's row; nothing is raised."""
    started, version = time.monotonic(), ""
    try:
        environment = client.prepare()
        version = environment.version(client.distribution)
        did, result = client.check(where, environment), "passed"
    except LeftOut as error:
        did, result = str(error), "left out"
    except Failed as error:
        did, result = str(error), "failed"
    except Exception:  # a check's assertion: its line tells more than its type
        did, result = traceback.format_exc(limit=-3), "failed"
    return Row(client.name, version, did, result, time.monotonic() - started)


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line a client; of a failure the first line, the rest stands below."""
    lines = ["| client | version | what was done | result |", "|---|---|---|---|"]
    for row in rows:
        did = row.did.splitlines()[0] if row.did else ""
        lines.append(
            f"| {row.client} | {row.version} | {did} | {row.result}, {row.seconds:.0f} s |"
        )
    for row in rows:
        if row.result == "failed":
            lines += ["", f"{row.client} failed:", row.did]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, only: Sequence[str] = ()) -> int:
    """The command; returns the exit status."""
    known = clients()
    parser = argparse.ArgumentParser(prog="tests.ecosystem", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(only), help=f"of {', '.join(known)}")
    parser.add_argument("--grpc", default="", help="HOST:PORT of a running stack")
    parser.add_argument("--http", default="", help="HOST:PORT of the same stack")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="what that stack serves")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    parser.add_argument("--prepare", action="store_true", help="make the environments, no more")
    options = parser.parse_args(arguments)
    names = [name for name in options.only.split(",") if name] or list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown client {unknown[0]!r}; known are {', '.join(known)}")
    if bool(options.grpc) != bool(options.http):
        parser.error("--grpc and --http name one stack: give both or neither")
    if options.prepare:
        return prepare([known[name] for name in names])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stack ends too
    rows = []
    with target(options.grpc, options.http, options.model) as where:
        for name in names:
            rows.append(try_client(known[name], where))
            print(f"ecosystem: {name}: {rows[-1].result}", file=sys.stderr, flush=True)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 1 if any(row.result == "failed" for row in rows) else 0
