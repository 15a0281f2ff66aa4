"""What a request does on its way: blocks move while the prompt is computed, and only what is new
moves again.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.greedy import GREEDY, greedy
from tests.support.stack import Stack, until

LONG = greedy(1500)
pytestmark = pytest.mark.timeout(300)


def log_lines(stack: Stack, process: str, request_id: str) -> list[dict[str, Any]]:
    """JSON lines of one process about one request."""
    lines = [line for line in stack.logs()[process].splitlines() if line.startswith("{")]
    return [line for line in map(json.loads, lines) if line.get("request_id") == request_id]


def ended(stack: Stack, process: str, request_id: str) -> dict[str, Any]:
    """The line with which a worker closes a request; it may come just after the client's end."""
    found: list[dict[str, Any]] = []

    def written() -> bool:
        lines = log_lines(stack, process, request_id)
        found[:] = [x for x in lines if str(x["event"]).endswith(" ended")]
        return bool(found)

    until(written, 5, f"{process} closes {request_id}")
    return found[0]


def test_a_long_prompt_s_blocks_move_while_it_is_computed(stack: Stack) -> None:
    tokens, _, done = stack.generate(
        LONG["prompt"], max_tokens=8, request_id="long", cache_salt="flow"
    )
    assert tokens == LONG["tokens"][:8]
    assert done.usage.prompt_tokens == 1500
    assert done.usage.cached_tokens == 0
    assert done.timing.kv_transfer > 0
    assert done.timing.first_token >= done.timing.prefill > done.timing.kv_transfer
    line = ended(stack, "decode-0", "long")
    first_pulled, _, num_chunks = line["timeline"]["pulled"]
    _, last_announced, _ = line["timeline"]["announced"]
    assert num_chunks >= 3
    assert first_pulled < last_announced, "the first chunk was here before the last was computed"
    # The same on the prefill worker's own clock, which on one host is the same clock.
    line = ended(stack, "prefill-0", "long")
    assert first_pulled < line["timeline"]["announced"][1]
    stack.assert_at_rest()


def test_the_same_prefix_again_moves_and_computes_only_what_is_new(stack: Stack) -> None:
    prefix = LONG["prompt"][:640]
    stack.generate([*prefix, 5], max_tokens=1, request_id="first", cache_salt="prefix")
    stack.assert_at_rest()
    before = stack.metrics("prefill"), stack.metrics("decode")
    _, _, done = stack.generate(
        prefix + LONG["prompt"][700:764] + [5],
        max_tokens=1,
        request_id="second",
        cache_salt="prefix",
    )
    stack.assert_at_rest()
    after = stack.metrics("prefill"), stack.metrics("decode")
    assert done.usage.cached_tokens == 640

    def rise(pool: int, name: str) -> float:
        return after[pool][f"diptych_{name}"] - before[pool][f"diptych_{name}"]

    assert rise(0, "prompt_tokens_total") == 64, "the prefill worker computes the new blocks"
    assert rise(1, "kv_transfer_blocks_total") == 4, "and they alone move"
    assert rise(1, "prompt_tokens_total") == 1, "the tail is the decode worker's"
    assert rise(1, "kv_stale_reads_total") == 0


def test_a_prompt_shorter_than_a_block_needs_no_prefill_worker(stack: Stack) -> None:
    case = GREEDY[0]
    assert len(case["prompt"]) < 16
    before = stack.metrics("prefill")["diptych_prompt_tokens_total"]
    tokens, _, done = stack.generate(case["prompt"], max_tokens=20)
    assert tokens == case["tokens"][:20]
    assert done.timing.kv_transfer == 0
    assert stack.metrics("prefill")["diptych_prompt_tokens_total"] == before


def test_drafts_are_accepted_and_counted(stack: Stack) -> None:
    case = GREEDY[4]  # a text that repeats itself
    tokens, _, done = stack.generate(case["prompt"], max_tokens=64)
    assert tokens == case["tokens"]
    assert 0 < done.usage.accepted_tokens <= done.usage.draft_tokens
    decode = stack.metrics("decode")
    assert decode["diptych_spec_decode_num_accepted_tokens_total"] >= done.usage.accepted_tokens


def test_a_request_id_is_in_the_logs_of_all_three_processes(stack: Stack) -> None:
    stack.generate(LONG["prompt"][800:860], max_tokens=2, request_id="follow-me")
    for process in ("coordinator", "prefill-0", "decode-0"):
        until(lambda p=process: bool(log_lines(stack, p, "follow-me")), 5, process)  # type: ignore[misc]


def test_metrics_have_the_public_names(stack: Stack) -> None:
    stack.generate("Once upon a time", max_tokens=4)
    import httpx

    front = httpx.get(f"http://{stack.http_address}/metrics").text
    for name in (
        "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket",
        "e2e_request_latency_seconds_count",
        "request_success_total",
        "num_requests_running",
        "num_requests_waiting",
        "admission_rejections_total",
        "migrations_total",
    ):
        assert f"diptych_{name}" in front, name
    assert 'le="0.004"' in front
    (worker,) = stack.workers("decode")
    back = httpx.get(f"http://{worker.http_address}/metrics").text
    for name in (
        "kv_cache_usage_perc",
        "prefix_cache_hits_total",
        "prefix_cache_queries_total",
        "spec_decode_num_accepted_tokens_total",
        "kv_transfer_bytes_total",
        "kv_stale_reads_total",
        "engine_step_seconds_bucket",
    ):
        assert f"diptych_{name}" in back, name
    assert httpx.get(f"http://{stack.http_address}/health/ready").status_code == 200
    assert httpx.get(f"http://{worker.http_address}/health/ready").status_code == 200


def test_cancelled_in_mid_answer_frees_everything(stack: Stack) -> None:
    events = stack.client.generate(LONG["prompt"], max_tokens=300, ignore_eos=True)
    next(events)
    events.close()  # type: ignore[attr-defined]
    stack.assert_at_rest(5)


def test_cancelled_while_its_prompt_is_computed_frees_everything(stack: Stack) -> None:
    """The prompt is new, so no block of it is cached."""
    prompt = LONG["prompt"][::-1]
    call = stack.client._inference[0].Generate(_request(prompt), timeout=60)
    until(lambda: bool(stack.workers("prefill")[0].num_running), 10, "the prompt is being computed")
    call.cancel()
    stack.assert_at_rest(10)


def test_a_deadline_runs_down_the_chain(stack: Stack) -> None:
    from engine.base.errors import DeadlineExceeded

    prompt = list(reversed(LONG["prompt"][:1400]))
    with pytest.raises(DeadlineExceeded):
        stack.generate(prompt, timeout_s=0.5, max_tokens=300)
    stack.assert_at_rest(10)


def _request(prompt: list[int]) -> Any:
    from coordinator.client import generate_request

    return generate_request(prompt, max_tokens=5)
