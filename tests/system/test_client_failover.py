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

CASE = greedy(300)
FLAGS = ("--dtype", "float32", "--kv-cache-memory", "384MiB")
SLOW = {"DIPTYCH_DRAFTER": "none"}  # an answer takes its time, and is met in the middle
PLAIN = {"max_tokens": 64}
SAMPLED = {"max_tokens": 96, "temperature": 0.9, "top_p": 0.95, "ignore_eos": True}
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "maxLength": 30},
        "b": {"type": "string", "maxLength": 30},
        "c": {"type": "integer", "minimum": 1, "maximum": 999},
    },
    "required": ["a", "b", "c"],
    "additionalProperties": False,
}
NOTICED_S = 3.0  # the client's limit of silence, and half a tick
SLACK_S = 3.0  # for the next coordinator's first token on a busy machine
KINDS = ("blocking", "asyncio")
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
    shape = Shape(prefill=1, decode=1, coordinators=2, worker_flags=FLAGS, env=SLOW)
    folder = tmp_path_factory.mktemp("failover")
    (folder / "sitecustomize.py").write_text(HANG)
    made = Cluster(folder, shape)
    for name in made.coordinators:
        made[name].env = {"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}
    with made as running:
        yield running


def ask(kind: str, addresses: str, got: Any, **options: Any) -> Any:
    """Read one answer to its end, by one of the two clients."""
    options = {"timeout_s": 60, **options}

    def blocking() -> None:
        with Client(addresses) as client:
            for event in client.generate(CASE["prompt"], **options):
                got.take(event)
            got.num_resumed = client.num_resumed

    async def for_asyncio() -> None:
        async with AsyncClient(addresses) as client:
            async for event in client.generate(CASE["prompt"], **options):
                got.take(event)
            got.num_resumed = client.num_resumed

    if kind == "blocking":
        blocking()
    else:
        asyncio.run(for_asyncio())
    return got


def all_of(cluster: Cluster) -> str:
    return ",".join(cluster.address(name) for name in cluster.coordinators)


def kill_first(cluster: Cluster) -> None:
    """kill -9, and it stays away."""
    place = cluster["coordinator-0"]
    place.held = True
    place.kill()


def hang_first(cluster: Cluster) -> None:
    os.kill(cluster["coordinator-0"].pid, signal.SIGUSR1)


def bring_back(cluster: Cluster) -> None:
    place = cluster["coordinator-0"]
    place.thaw()
    place.held = False
    cluster.until_whole()


def assert_at_rest(cluster: Cluster) -> None:
    """The workers hold nothing for the coordinator that was lost."""
    deadline = time.monotonic() + 10
    while held := [r for r in cluster.rows("coordinator-1").values() if r.held_blocks]:
        assert time.monotonic() < deadline, f"still held: {held}"
        time.sleep(0.2)


@pytest.mark.parametrize("options", [PLAIN, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
def test_kill_9_of_the_coordinator_leaves_no_seam(
    cluster: Cluster, kind: str, options: dict[str, Any]
) -> None:
    """A sampled request brings no seed: it is a hash of the id that all its calls carry."""
    options = {**options, "request_id": f"{kind}-{options['max_tokens']}"}
    undisturbed = ask(kind, cluster.address("coordinator-1"), Got(), **options)
    assert undisturbed.num_resumed == 0
    got = ask(kind, all_of(cluster), Got(lambda: kill_first(cluster)), **options)
    try:
        assert got.num_resumed == 1, "it was in the middle of the answer"
        assert (got.tokens, got.text) == (undisturbed.tokens, undisturbed.text)
        if "temperature" not in options:
            assert got.tokens == CASE["tokens"]
        assert got.done
        assert got.done.usage.completion_tokens == len(got.tokens) == options["max_tokens"]
        assert got.done.request_id == options["request_id"]
        longest_s = max(b - a for a, b in itertools.pairwise(got.moments))
        print(f"{kind}: the longest wait was {longest_s:.2f} s")
        assert longest_s < 2.0
        assert_at_rest(cluster)
    finally:
        bring_back(cluster)


@pytest.mark.parametrize("held", [{}, {"json_schema": SCHEMA}], ids=["free", "held"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_leaves_no_seam_in_any_choice(cluster: Cluster, kind: str, held: dict[str, Any]) -> None:
    options = {**SAMPLED, "max_tokens": 48, "n": 3, "logprobs": 1, **held}
    options |= {"request_id": f"{kind}-{len(held)}", "ignore_eos": not held}
    undisturbed = ask(
        kind, cluster.address("coordinator-1"), Choices([Got(), Got(), Got()]), **options
    )
    got = Choices([Got(), Got(lambda: kill_first(cluster)), Got()])
    try:
        ask(kind, all_of(cluster), got, **options)
        assert got.num_resumed == 1, "it was in the middle of the answer"
        for index, (mine, wanted) in enumerate(zip(got.of, undisturbed.of, strict=True)):
            assert (mine.tokens, mine.text) == (wanted.tokens, wanted.text)
            assert mine.done
            assert wanted.done
            assert mine.done.index == index
            assert mine.done.finish_reason == wanted.done.finish_reason
            assert mine.done.usage.completion_tokens == len(mine.tokens)
            if held and mine.done.finish_reason == "stop":
                assert set(json.loads(mine.text)) == {"a", "b", "c"}
        assert len({tuple(choice.tokens) for choice in got.of}) == 3
        assert_at_rest(cluster)
    finally:
        bring_back(cluster)


@pytest.mark.parametrize("options", [PLAIN, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_coordinator_whose_event_loop_hangs_is_left_within_seconds(
    cluster: Cluster, kind: str, options: dict[str, Any]
) -> None:
    """Its connection answers pings. In mid-answer, and then before the first token."""
    options = {**options, "request_id": f"hang-{kind}-{options['max_tokens']}"}
    undisturbed = ask(kind, cluster.address("coordinator-1"), Got(), **options)
    try:
        got = ask(kind, all_of(cluster), Got(lambda: hang_first(cluster)), **options)
        assert got.num_resumed == 1, "it was in the middle of the answer"
        assert (got.tokens, got.text) == (undisturbed.tokens, undisturbed.text)
        longest_s = max(b - a for a, b in itertools.pairwise(got.moments))
        began_s = time.monotonic()
        got = ask(kind, all_of(cluster), Got(), **options)
        assert got.num_resumed == 0
        assert (got.tokens, got.text) == (undisturbed.tokens, undisturbed.text)
        first_s = got.moments[0] - began_s
        print(f"{kind}: the longest wait was {longest_s:.2f} s, of the first token {first_s:.2f} s")
        assert max(longest_s, first_s) < NOTICED_S + SLACK_S
    finally:
        kill_first(cluster)
        bring_back(cluster)
    assert_at_rest(cluster)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_coordinator_is_noticed_within_seconds(cluster: Cluster, kind: str) -> None:
    """Its connection stays open and silent: the client's ping gets no answer."""
    freeze = cluster["coordinator-0"].freeze
    try:
        got = ask(kind, all_of(cluster), Got(freeze), **PLAIN)
        assert got.tokens == CASE["tokens"]
        assert got.num_resumed == 1
        longest_s = max(b - a for a, b in itertools.pairwise(got.moments))
        print(f"{kind}: the longest wait was {longest_s:.2f} s")
        assert longest_s < NOTICED_S + SLACK_S
    finally:
        bring_back(cluster)
    assert_at_rest(cluster)
    for name in cluster.coordinators:
        assert "too_many_pings" not in cluster.tail(name, 10_000)
