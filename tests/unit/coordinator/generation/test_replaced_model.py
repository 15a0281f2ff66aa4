"""An answer that one model began is not continued by another one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from coordinator.cluster.membership import Membership
from coordinator.cluster.worker import FORGET_S, SILENCE_S, Hello
from coordinator.generation.dispatch import Dispatch
from coordinator.routing.affinity import Affinity, affinity_of, affinity_token_of
from coordinator.routing.policy import least_loaded
from coordinator.routing.retry import Retry
from engine.base.errors import Mismatch, Unavailable
from engine.base.types import PROTOCOL_VERSION, ModelIdentity, Peer, Role
from engine.telemetry.coordinator_metrics import CoordinatorMetrics

MODEL = ModelIdentity("m", "00ff", "profile", 128, 16, 320)
OTHER = replace(MODEL, digest="11ee")


class Table:
    """A table of one decode worker after the other, in a time of its own."""

    def __init__(self) -> None:
        self.now = 100.0
        metrics = CoordinatorMetrics(CollectorRegistry(), "m")
        self.members = Membership("m", 320, metrics, lambda: self.now)

    def come(self, name: str, model: ModelIdentity = MODEL) -> None:
        peer = Peer(name, f"{name}-{self.now}", "127.0.0.1:1")
        self.members.register(Hello(peer, Role.DECODE, "", model, PROTOCOL_VERSION))

    def dispatch(self, affinity: Affinity | None = None) -> Dispatch:
        deadline_s = self.now + 1000
        retry = Retry(
            least_loaded,
            self.members,
            worker_wait_s=0.0,
            deadline_s=deadline_s,
            affinity=affinity or Affinity(),
        )
        return Dispatch(retry, self.members, clock=lambda: self.now)


@pytest.fixture(autouse=True)
def _no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.routing.retry.FIRST_BACKOFF_S", 0.0)


@pytest.mark.parametrize("name", ["decode-0", "decode-1"])
async def test_the_only_worker_comes_back_with_another_model(name: str) -> None:
    for model in (MODEL, OTHER):
        table = Table()
        table.come("decode-0")
        begun, fresh = table.dispatch(), table.dispatch()
        route = await begun.next(40)
        begun.retry.progressed()
        await fresh.next(40)
        for worker in table.members.snapshot():
            table.members.lost(worker, "killed")
        await begun.failed(route, Unavailable("lost"))
        with pytest.raises(Unavailable):  # nothing is known of what will come
            await begun.next(41)
        table.now += FORGET_S + SILENCE_S
        table.come(name, model)
        assert (await fresh.next(40)).decode.model == model, "no token yet"
        if model is MODEL:
            assert (await begun.next(41)).decode.model == MODEL
            continue
        with pytest.raises(Mismatch, match="model was replaced after this answer had begun"):
            await begun.next(41)


async def test_a_resume_names_the_model_that_began() -> None:
    table = Table()
    table.come("decode-0")
    (worker,) = table.members.snapshot()
    name = affinity_token_of(worker)
    assert len(name) <= 128
    assert affinity_of(table.members.view(), name).decode == worker.peer.incarnation
    after = Table()  # another coordinator, or this one later
    after.come("decode-0", OTHER)
    with pytest.raises(Mismatch):
        await after.dispatch(affinity_of(after.members.view(), name)).next(41)
    same = Table()
    same.now += 7.0
    same.come("decode-9")
    assert (await same.dispatch(affinity_of(same.members.view(), name)).next(41)).prefill is None
    for hint in ("", "x", "a.b", "0" * 128, f"{'g' * 16}.{'0' * 16}", name[:16], name + "\n"):
        await after.dispatch(affinity_of(after.members.view(), hint)).next(41)  # no name of ours
