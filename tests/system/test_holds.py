"""/debug/holds of all three processes, while a prompt is computed, while an answer is written, and
after: every hold is named, and every held block is explained.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from coordinator.client import generate_request
from tests.support.greedy import greedy
from tests.support.http_get import http_get
from tests.support.paths import ROOT
from tests.support.stack import Stack, until

LONG = greedy(1500)
pytestmark = pytest.mark.timeout(300)


def report(stack: Stack, http_address: str) -> dict[str, Any]:
    """What a process reports; at any moment each hold has an owner, a reason and an end.

    An engine in a step of more than a second reports that it does not answer: it is asked again.
    """
    found: dict[str, Any] = {}

    def answered() -> bool:
        response = http_get(f"http://{http_address}/debug/holds", 10, stack.operator)
        assert response.headers["content-type"] == "application/json"
        found.update(response.json())
        return "pool" not in found or found["pool"].get("unexplained") is not None

    until(answered, 20, "every thread reports what it holds")
    for hold in found["holds"]:
        assert hold["owner"] and hold["reason"] and hold["age_s"] >= 0, hold
        assert hold["deadline_s"] is not None or hold["note"], hold
    if pool := found.get("pool"):
        assert pool["unexplained"] == 0, pool
        assert pool["free"] + pool["cached"] + pool["held"] == pool["total"]
    return found


def kinds(found: dict[str, Any], request_id: str) -> set[str]:
    """Kinds of hold that are there for one request."""
    mine = [h for h in found["holds"] if request_id in (h["owner"], h.get("request_id"))]
    return {str(hold["kind"]) for hold in mine}


def test_holds_from_the_prompt_to_the_end(stack: Stack) -> None:
    (p,), (d,) = stack.workers("prefill"), stack.workers("decode")
    request = generate_request(
        LONG["prompt"], max_tokens=200, ignore_eos=True, request_id="held", cache_salt="held"
    )
    call = stack.client._inference[0].Generate(request, timeout=120)

    seen: dict[str, set[str]] = {"prefill": set(), "decode": set()}

    def prefilling() -> bool:
        at_p, at_d = report(stack, p.http_address), report(stack, d.http_address)
        seen["prefill"] |= kinds(at_p, "held")
        seen["decode"] |= kinds(at_d, "held")
        (hold,) = report(stack, stack.http_address)["holds"]
        assert (hold["owner"], hold["num_tokens"]) == ("held", 1500)
        if "waits for tokens" not in hold["reason"]:
            return "is being answered" in hold["reason"]
        assert "decode-0 with prefill-0" in hold["reason"]
        assert 100 < hold["deadline_s"] < 121  # gRPC rounds what it sends
        return False

    until(
        lambda: (
            bool(report(stack, stack.http_address)["holds"])
            and report(stack, stack.http_address)["holds"][0].get("num_tokens") == 1500
            and "waits for tokens" in report(stack, stack.http_address)["holds"][0]["reason"]
        ),
        10,
        "the request is on its way",
        0.01,
    )
    until(prefilling, 60, "the answer begins", 0.01)
    assert {"request", "lease"} <= seen["prefill"]
    assert {"request", "task"} <= seen["decode"]

    next(call)
    at_d = report(stack, d.http_address)
    (running,) = [hold for hold in at_d["holds"] if hold["kind"] == "request"]
    assert running["owner"] == "held" and "running" in running["reason"]
    assert running["num_blocks"] == at_d["pool"]["held"] >= 94
    assert 0 < running["deadline_s"] < 121
    command = [sys.executable, "-m", "coordinator.cli", "status", "--holds"]
    shown = subprocess.run(
        [*command, "--server", stack.address], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert shown.returncode == 0, shown.stderr
    (line,) = [line for line in shown.stdout.splitlines() if "running: this answer" in line]
    assert "decode-0" in line and "held" in line
    until(lambda: not report(stack, p.http_address)["holds"], 10, "the prefill worker is done")

    call.cancel()
    stack.assert_at_rest()
    for address in (stack.http_address, p.http_address, d.http_address):
        until(lambda a=address: not report(stack, a)["holds"], 5, f"nothing is held at {address}")  # type: ignore[misc]
