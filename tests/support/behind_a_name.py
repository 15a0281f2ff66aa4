"""Two coordinators behind the name `front`, and a client that knows only the name.

Run by `tests/unit/coordinator/client/test_client_names.py` where /etc/hosts gives that name two
addresses; prints what came of it.
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

from coordinator.client import AsyncClient, TextDelta
from tests.support.fake_coordinator import ANSWER, Cue, FakeCoordinator, whole


async def _ask(client: AsyncClient) -> bool:
    """Whether the answer came whole."""
    tokens: list[int] = []
    text = ""
    async for event in client.generate("x", timeout_s=20):
        if isinstance(event, TextDelta):
            tokens += event.token_ids
            text += event.text
    return (tuple(tokens), text) == (ANSWER, whole(ANSWER))


async def _main() -> dict[str, Any]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    fakes = [FakeCoordinator(host=host, port=port) for host in ("127.0.0.1", "127.0.0.2")]
    for fake in fakes:
        await fake.start()
    found: dict[str, Any] = {}
    async with AsyncClient(f"front:{port}") as client:
        found["whole"] = [await _ask(client) for _ in range(8)]
        found["spread"] = [len(fake.requests) for fake in fakes]
        fakes[0].cues = [Cue(5, "vanish")]
        found["whole"] += [await _ask(client) for _ in range(6)]
        found["num_resumed"] = client.num_resumed
        found["in_the_end"] = [len(fake.requests) for fake in fakes]
    for fake in fakes:
        await fake.stop()
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_main())))
