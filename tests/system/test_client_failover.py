"""The client library when a coordinator is lost in mid-stream: real processes, real signals, and a
stream that its caller cannot tell from the undisturbed one.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from coordinator.client import AsyncClient, Client, Done, TextDelta
from tests.support.cluster import Cluster, Shape
from tests.support.greedy import greedy
from tests.support.process_slots import ProcessSlot
from tests.support.stack import until

PROMPT = greedy(300)["prompt"]
# An answer takes a second and more, and is met in the middle.
SLOW = {"DIPTYCH_DRAFTER": "none"}
GREEDY = {"max_tokens": 160, "ignore_eos": True}
SAMPLED = {"max_tokens": 192, "temperature": 0.9, "top_p": 0.95, "ignore_eos": True}
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "minLength": 60, "maxLength": 90},
        "b": {"type": "string", "minLength": 60, "maxLength": 90},
        "c": {"type": "integer", "minimum": 1, "maximum": 999},
    },
    "required": ["a", "b", "c"],
    "additionalProperties": False,
}
NOTICED_S = 3.0  # the client's limit of silence, and half a tick
SLACK_S = 3.0  # for the next coordinator's first token on a busy machine
KINDS = ("blocking", "asyncio")
SURVIVOR = "coordinator-2"
VICTIMS = itertools.cycle(("coordinator-0", "coordinator-1"))
# At SIGUSR1 a coordinator's event loop hangs, and gRPC's threads go on.
HANG = "import signal, time; signal.signal(signal.SIGUSR1, lambda *_: time.sleep(600))"
pytestmark = pytest.mark.timeout(300)


@dataclass
class Got:
    """An answer as its caller saw it; `disturb` is run once, when five tokens have come."""

    disturb: Callable[[], None] | None = None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    moments: list[float] = field(default_factory=list)
    done: Done | None = None
    num_resumed: int = 0

    def take(self, event: TextDelta | Done) -> None:
        if isinstance(event, Done):
            self.done = event
            return
        self.tokens += event.token_ids
        self.text += event.text
        self.moments.append(time.monotonic())
        if self.disturb and len(self.tokens) >= 5:
            self.disturb()
            self.disturb = None


@dataclass
class Choices:
    """The same for an answer of several choices."""

    of: list[Got]
    num_resumed: int = 0

    def take(self, event: TextDelta | Done) -> None:
        self.of[event.index].take(event)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    shape = Shape(prefill=1, decode=1, coordinators=3, env=SLOW)
    folder = tmp_path_factory.mktemp("failover")
    (folder / "sitecustomize.py").write_text(HANG)
    made = Cluster(folder, shape)
    for name in made.coordinators:
        made[name].env = {"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}
    with made as running:
        yield running


@pytest.fixture
def victim(cluster: Cluster) -> Iterator[ProcessSlot]:
    """A coordinator to lose. It starts again beside the next test, which gets the other one."""
    slot = cluster[next(VICTIMS)]
    until(lambda: knows_all(cluster, slot.name), 60, f"{slot.name} knows all workers")
    yield slot
    slot.thaw()
    slot.held = False


def knows_all(cluster: Cluster, coordinator: str) -> bool:
    rows = cluster.rows(coordinator)
    return all(name in rows and rows[name].state == "ready" for name in cluster.workers)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Callable[[dict[str, Any]], list[Got]]:
    """The choices of an answer by a coordinator that is not lost; each request is sent once."""
    known: dict[str, list[Got]] = {}

    def answer(options: dict[str, Any]) -> list[Got]:
        if (request_id := options["request_id"]) not in known:
            got = Choices([Got() for _ in range(options.get("n", 1))])
            ask("blocking", cluster.address(SURVIVOR), got, **options)
            assert got.num_resumed == 0
            known[request_id] = got.of
        return known[request_id]

    return answer


def ask(kind: str, addresses: str, got: Any, **options: Any) -> Any:
    """Read one answer to its end, by one of the two clients."""
    options = {"timeout_s": 60, **options}

    def blocking() -> None:
        with Client(addresses) as client:
            for event in client.generate(PROMPT, **options):
                got.take(event)
            got.num_resumed = client.num_resumed

    async def for_asyncio() -> None:
        async with AsyncClient(addresses) as client:
            async for event in client.generate(PROMPT, **options):
                got.take(event)
            got.num_resumed = client.num_resumed

    if kind == "blocking":
        blocking()
    else:
        asyncio.run(for_asyncio())
    return got


def both(cluster: Cluster, victim: ProcessSlot) -> str:
    """The addresses of a client that dials `victim` first."""
    return f"{cluster.address(victim.name)},{cluster.address(SURVIVOR)}"


def kill(victim: ProcessSlot) -> None:
    """kill -9, and it stays away."""
    victim.held = True
    victim.kill()


def assert_at_rest(cluster: Cluster) -> None:
    """The workers hold nothing for the coordinator that was lost."""
    deadline = time.monotonic() + 10
    while held := [r for r in cluster.rows(SURVIVOR).values() if r.held_blocks]:
        assert time.monotonic() < deadline, f"still held: {held}"
        time.sleep(0.2)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
def test_kill_9_of_the_coordinator_leaves_no_seam(
    cluster: Cluster,
    victim: ProcessSlot,
    undisturbed: Callable[[dict[str, Any]], list[Got]],
    kind: str,
    options: dict[str, Any],
) -> None:
    """A sampled request brings no seed: it is a hash of the id that all its calls carry."""
    options = {**options, "request_id": f"one-{options['max_tokens']}"}
    (expected,) = undisturbed(options)
    got = ask(kind, both(cluster, victim), Got(lambda: kill(victim)), **options)
    assert got.num_resumed == 1, "it was in the middle of the answer"
    assert (got.tokens, got.text) == (expected.tokens, expected.text)
    assert got.done
    assert got.done.usage.completion_tokens == len(got.tokens) == options["max_tokens"]
    assert got.done.request_id == options["request_id"]
    longest_s = max(b - a for a, b in itertools.pairwise(got.moments))
    print(f"{kind}: the longest wait was {longest_s:.2f} s")
    assert longest_s < 2.0
    assert_at_rest(cluster)


@pytest.mark.parametrize("held", [{}, {"json_schema": SCHEMA}], ids=["free", "held"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_leaves_no_seam_in_any_choice(
    cluster: Cluster,
    victim: ProcessSlot,
    undisturbed: Callable[[dict[str, Any]], list[Got]],
    kind: str,
    held: dict[str, Any],
) -> None:
    options = {**SAMPLED, "max_tokens": 128, "n": 3, "logprobs": 1, **held}
    options |= {"request_id": f"three-{len(held)}", "ignore_eos": not held}
    got = Choices([Got(), Got(lambda: kill(victim)), Got()])
    expected = undisturbed(options)
    ask(kind, both(cluster, victim), got, **options)
    assert got.num_resumed == 1, "it was in the middle of the answer"
    for index, (mine, whole) in enumerate(zip(got.of, expected, strict=True)):
        assert (mine.tokens, mine.text) == (whole.tokens, whole.text)
        assert mine.done
        assert whole.done
        assert mine.done.index == index
        assert mine.done.finish_reason == whole.done.finish_reason
        assert mine.done.usage.completion_tokens == len(mine.tokens)
        if held and mine.done.finish_reason == "stop":
            assert set(json.loads(mine.text)) == {"a", "b", "c"}
    assert len({tuple(choice.tokens) for choice in got.of}) == 3
    assert_at_rest(cluster)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_coordinator_whose_event_loop_hangs_is_left_within_seconds(
    cluster: Cluster,
    victim: ProcessSlot,
    undisturbed: Callable[[dict[str, Any]], list[Got]],
    kind: str,
    options: dict[str, Any],
) -> None:
    """Its connection answers pings. In mid-answer, and then before the first token."""
    options = {**options, "request_id": f"one-{options['max_tokens']}"}
    (expected,) = undisturbed(options)

    def hang() -> None:
        os.kill(victim.pid, signal.SIGUSR1)

    try:
        got = ask(kind, both(cluster, victim), Got(hang), **options)
        assert got.num_resumed == 1, "it was in the middle of the answer"
        assert (got.tokens, got.text) == (expected.tokens, expected.text)
        longest_s = max(b - a for a, b in itertools.pairwise(got.moments))
        began_s = time.monotonic()
        got = ask(kind, both(cluster, victim), Got(), **options)
        assert got.num_resumed == 0
        assert (got.tokens, got.text) == (expected.tokens, expected.text)
        first_s = got.moments[0] - began_s
        print(f"{kind}: the longest wait was {longest_s:.2f} s, of the first token {first_s:.2f} s")
        assert max(longest_s, first_s) < NOTICED_S + SLACK_S
    finally:
        kill(victim)
    assert_at_rest(cluster)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_coordinator_is_noticed_within_seconds(
    cluster: Cluster,
    victim: ProcessSlot,
    undisturbed: Callable[[dict[str, Any]], list[Got]],
    kind: str,
) -> None:
    """Its connection stays open and silent: the client's ping gets no answer."""
    options = {**GREEDY, "request_id": f"one-{GREEDY['max_tokens']}"}
    (expected,) = undisturbed(options)
    try:
        got = ask(kind, both(cluster, victim), Got(victim.freeze), **options)
        assert (got.tokens, got.text) == (expected.tokens, expected.text)
        assert got.num_resumed == 1
        longest_s = max(b - a for a, b in itertools.pairwise(got.moments))
        print(f"{kind}: the longest wait was {longest_s:.2f} s")
        assert longest_s < NOTICED_S + SLACK_S
    finally:
        victim.thaw()
    assert_at_rest(cluster)
    for name in cluster.coordinators:
        assert "too_many_pings" not in cluster.tail(name, 10_000)
