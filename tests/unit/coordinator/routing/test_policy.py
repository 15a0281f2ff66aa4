"""What `least_loaded` chooses: by examples, and against the rules written another way."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from dataclasses import replace

import pytest

from coordinator.cluster.incidents import PENALTY_S
from coordinator.cluster.worker import (
    HEARTBEAT_S,
    SILENCE_S,
    ClusterView,
    Load,
    Worker,
    WorkerState,
)
from coordinator.routing.affinity import affinity_of, affinity_token_of, model_tag
from coordinator.routing.policy import POLICIES, Plan, RequestView, least_loaded
from engine.base import options
from engine.base.errors import ConfigError
from engine.base.option_groups import FrontOptions
from engine.base.types import Health, Role
from tests.unit.coordinator.routing.clusters import MODEL, NOW_S, random_worker, view, worker

BLOCK = MODEL.block_size


def chosen(cluster: ClusterView, **request) -> str:
    """The plan in words; "": there is none."""
    return str(least_loaded(cluster, RequestView(**{"num_tokens": 100, **request})) or "")


def test_fewest_tokens_then_requests_then_the_lowest_id():
    workers = [worker("d0"), worker("d1"), worker("d2"), worker("p0", Role.PREFILL)]
    assert chosen(view(*workers)) == "d0 with p0"
    assert chosen(view(*reversed(workers))) == "d0 with p0"
    workers[0] = replace(workers[0], load=Load(waiting_tokens=100))
    assert chosen(view(*workers)) == "d1 with p0"
    workers[1] = replace(workers[1], load=Load(num_running=1))
    assert chosen(view(*workers)) == "d2 with p0"
    workers[2] = replace(workers[2], assigned_requests=2)
    assert chosen(view(*workers)) == "d1 with p0"


def test_roles_states_and_failures():
    workers = [worker("d0"), worker("d1"), worker("p0", Role.PREFILL)]
    assert chosen(view(*workers), failures={"of-p0": 1}) == "d0"
    assert chosen(view(*workers), failures={"of-d0": 1}) == "d1 with p0"
    assert chosen(view(*workers), failures={"of-d0": 1, "of-d1": 1}) == "d0 with p0", "as often"
    assert chosen(view(*workers), failures={"of-d0": 2, "of-d1": 1}) == "d1 with p0"
    for state in (WorkerState.SUSPECT, WorkerState.DRAINING):
        assert chosen(view(*(replace(w, state=state) for w in workers))) == ""
    assert chosen(view()) == ""


@pytest.mark.parametrize(("num_tokens", "plan"), [(16, "d0"), (17, "d0 with p0"), (0, "d0")])
def test_a_prompt_without_a_whole_block_before_its_last_token_needs_no_prefill(num_tokens, plan):
    cluster = view(worker("d0"), worker("p0", Role.PREFILL))
    assert chosen(cluster, num_tokens=num_tokens) == plan
    assert chosen(cluster, num_tokens=num_tokens, computes_alone=True) == "d0"


def test_time_alone_ends_a_penalty_and_degrades_a_stalled_worker():
    """The rows are the same objects: only the moment of the view differs."""
    workers = [
        worker("d0", penalized_until_s=NOW_S + PENALTY_S),
        worker("d1", load=Load(num_running=1)),
    ]
    assert chosen(view(*workers)) == "d1"
    heard = [replace(w, heard_s=NOW_S + PENALTY_S) for w in workers]
    assert chosen(view(*heard, now_s=NOW_S + PENALTY_S - 0.01)) == "d1"
    assert chosen(view(*heard, now_s=NOW_S + PENALTY_S)) == "d0"
    stalled = [replace(heard[0], heard_s=NOW_S + PENALTY_S - SILENCE_S - 0.01), heard[1]]
    assert chosen(view(*stalled, now_s=NOW_S + PENALTY_S)) == "d1"


def test_equal_views_give_equal_plans_and_values_cannot_be_changed():
    rng = random.Random(1)
    cluster = view(*(random_worker(rng, f"w{i}") for i in range(20)))
    request = RequestView(100, failures={})
    plan = least_loaded(cluster, request)
    assert plan == least_loaded(view(*cluster.workers), replace(request))
    for value in (plan, cluster, request):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, dataclasses.fields(value)[0].name, None)


def test_the_flag_names_every_policy_and_no_other():
    (flag,) = [f for f in dataclasses.fields(FrontOptions) if f.name == "routing"]
    assert tuple(flag.metadata["choices"]) == tuple(POLICIES)
    assert flag.default == "least_loaded"


@pytest.mark.parametrize("value", ["load", "random", "Least_loaded"])
@pytest.mark.parametrize("source", ["flag", "environment", "file"])
def test_another_policy_is_refused_with_its_source_and_what_is_right(source, value, tmp_path):
    with pytest.raises(ConfigError, match=f"expected one of least_loaded, got '{value}'") as found:
        routing(source, value, tmp_path)
    assert {"flag": "--routing", "environment": "DIPTYCH_ROUTING"}.get(source, "routing") in str(
        found.value
    )


@pytest.mark.parametrize("source", ["flag", "environment", "file"])
def test_the_policy_may_be_set_everywhere(source, tmp_path):
    assert routing(source, "least_loaded", tmp_path) == "least_loaded"


def routing(source: str, value: str, folder) -> str:
    parser = options.parser("test", "")
    options.add_flags(parser, FrontOptions)
    argv, environ = [], {}
    if source == "flag":
        argv = ["--routing", value]
    elif source == "environment":
        environ = {"DIPTYCH_ROUTING": value}
    else:
        path = folder / "options.toml"
        path.write_text(f'routing = "{value}"\n')
        argv = ["--config", str(path)]
    (front,) = options.resolve(parser.parse_args(argv), FrontOptions, environ=environ)
    return front.routing


# The rules as they were before routing was a policy: a snapshot with `degraded` as a value, a
# choice by role that excludes incarnations, and the caller's own rules around it.


def old_pick(workers, role, exclude=(), num_tokens=0):
    candidates = [w for w, _ in old_ready(workers, role, exclude)]
    degraded = {w.peer.worker_id: is_degraded for w, is_degraded in workers}
    candidates = [w for w in candidates if w.model.max_model_len >= num_tokens]
    if role is Role.PREFILL:
        candidates = [w for w in candidates if not degraded[w.peer.worker_id]]

    def weight(w):
        return (
            degraded[w.peer.worker_id],
            max(w.load.waiting_tokens, w.assigned_tokens),
            max(w.load.num_running + w.load.num_waiting, w.assigned_requests),
            w.peer.worker_id,
        )

    return min(candidates, key=weight, default=None)


def old_sticky(workers, role, incarnation, exclude=()):
    ready = [w for w, is_degraded in old_ready(workers, role, exclude) if not is_degraded]
    fewest_waiting = min((w.load.num_waiting for w in ready), default=0)
    for w in ready:
        if w.peer.incarnation == incarnation:
            return None if w.load.num_waiting > fewest_waiting + 4 else w
    return None


def old_ready(workers, role, exclude):
    return [
        (w, is_degraded)
        for w, is_degraded in workers
        if w.role is role and w.state is WorkerState.READY and w.peer.incarnation not in exclude
    ]


def old_snapshot(cluster: ClusterView):
    now = cluster.now_s
    return [
        (
            w,
            now < w.penalized_until_s
            or now - w.heard_s > SILENCE_S
            or w.load.health is not Health.OK
            or w.is_sick,
        )
        for w in cluster.workers
    ]


def old_plan(cluster: ClusterView, request: RequestView) -> Plan | None:
    every, failures, size = old_snapshot(cluster), Counter(request.failures), request.max_tokens
    ours = [row for row in every if not request.model or model_tag(row[0]) == request.model]
    counts = {
        w.peer.incarnation: failures[w.peer.incarnation]
        for w, _ in ours
        if w.role is Role.DECODE and w.state is WorkerState.READY and w.model.max_model_len >= size
    }
    fewest = min(counts.values(), default=0)
    worse = {incarnation for incarnation, count in counts.items() if count > fewest}
    kept = [row for row in ours if row[0].peer.incarnation == request.sticky_decode]
    decode = old_pick(kept, Role.DECODE, num_tokens=size) or old_pick(
        ours, Role.DECODE, worse, size
    )
    if decode is None:
        return None
    prefill = None
    num_whole = (request.num_tokens - 1) // decode.model.block_size * decode.model.block_size
    if not request.computes_alone and num_whole > 0:
        if failures:
            prefill = old_sticky(every, Role.PREFILL, request.sticky_prefill, failures)
            if prefill and not old_is_heard(cluster, prefill):
                prefill = None
        prefill = prefill or old_pick(every, Role.PREFILL, failures, num_whole)
    return Plan(prefill, decode)


def old_is_heard(cluster: ClusterView, worker: Worker) -> bool:
    return any(
        row.peer.incarnation == worker.peer.incarnation
        and row.state is not WorkerState.SUSPECT
        and cluster.now_s - row.heard_s < 2 * HEARTBEAT_S
        for row in cluster.workers
    )


def random_case(rng: random.Random) -> tuple[ClusterView, RequestView]:
    workers = [random_worker(rng, f"w{i:02}") for i in range(rng.choice((0, 1, 2, 3, 6, 12)))]
    workers = [
        replace(w, model=replace(w.model, max_model_len=rng.choice((64, 1024, 8192))))
        for w in workers
    ]
    names = [w.peer.incarnation for w in workers] or ["of-none"]
    failed = rng.sample(names, rng.randint(0, len(names))) if rng.random() < 0.7 else []
    request = RequestView(
        num_tokens=rng.choice((1, 16, 17, 65, 66, 1040, 1041, 5000)),
        max_tokens=rng.choice((0, 64, 65, 1024, 8192)),
        computes_alone=rng.random() < 0.1,
        model=rng.choice(("", "", *(model_tag(w) for w in workers[:2]))),
        sticky_decode=rng.choice(("", *names)),
        sticky_prefill=rng.choice(("", *names)),
        failures=Counter({name: rng.randint(1, 3) for name in failed}),
    )
    return view(*workers), request


def test_least_loaded_is_what_was_there_before():
    rng = random.Random(20261201)
    kinds: Counter[str] = Counter()
    for _ in range(6_000):
        cluster, request = random_case(rng)
        plan, expected = least_loaded(cluster, request), old_plan(cluster, request)
        assert plan == expected, (cluster, request)
        if plan is None:
            kinds["none"] += 1
            continue
        kinds["with prefill" if plan.prefill else "alone"] += 1
        kinds["sticky decode"] += plan.decode.peer.incarnation == request.sticky_decode
        kinds["degraded decode"] += plan.decode.is_degraded(cluster.now_s)
        kept = plan.prefill and plan.prefill.peer.incarnation == request.sticky_prefill
        kinds["sticky prefill"] += bool(kept and request.failures)
    assert min(kinds.values()) > 30, kinds


def test_a_token_is_resolved_as_before():
    rng = random.Random(7)
    num_found = 0
    for _ in range(500):
        cluster, _ = random_case(rng)
        for row in cluster.workers:
            token, name = affinity_token_of(row), row.peer.incarnation
            expected = old_sticky(old_snapshot(cluster), Role.DECODE, name)
            found = affinity_of(cluster, token)
            assert found.decode == (expected.peer.incarnation if expected else "")
            assert (found.model, found.prefill) == (model_tag(row), "")
            num_found += bool(found.decode)
    assert num_found > 50
