"""Law 1 in the default stack, as `coordinator start` runs it on a CPU: not within a bound but bit
for bit, with drafts, batches, prefix hits and either pool's steps.

The kernels give a token the same logits whatever else is in a step, so here no near-tie is excused.
"""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from engine.checkpoint.packed import packed_file, read_packed
from engine.checkpoint.source import resolve
from engine.kernels import kernels
from engine.runner.native_model import NativeModel
from tests.support.mixed_requests import CASES, ask_all
from tests.support.near_tie import Outcome
from tests.support.plain_loop import PlainLoop
from tests.support.recorded import RecordedAnswers
from tests.support.stack import DEFAULT, SharedStacks

LIBRARY = kernels()
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(LIBRARY is None, reason="needs our CPU kernels"),
]


def _oracle(choice: str) -> PlainLoop:
    assert LIBRARY
    checkpoint = resolve("smollm2")
    weights = read_packed(packed_file(checkpoint, choice), checkpoint.config)
    return PlainLoop(NativeModel(checkpoint.config, weights, LIBRARY))


@pytest.mark.parametrize("choice", ["auto", "bf16"])
def test_64_mixed_requests_equal_the_oracle_bit_for_bit(
    choice: str, stacks: SharedStacks, record_answers: bool
) -> None:
    oracle = RecordedAnswers(f"mixed_{choice}", partial(_oracle, choice))
    if record_answers:
        oracle.record([case.work for case in CASES])
    flags = () if choice == "auto" else ("--weights", choice)
    stack = stacks.get(*DEFAULT, *flags)
    answers = asyncio.run(ask_all(stack.address))
    for case, (tokens, reason) in zip(CASES, answers, strict=True):
        verdict = oracle.judge(case.work, tokens, reason)
        assert verdict.outcome is Outcome.EQUAL, verdict.detail
    stack.assert_at_rest()
    seen = stack.metrics("decode")
    assert seen["diptych_kv_transfer_blocks_total"] > 100
    assert seen["diptych_kv_stale_reads_total"] == 0
    assert seen["diptych_spec_decode_num_draft_tokens_total"] > 0
    assert seen["diptych_kv_transfer_bytes_per_second"] > 0
    decode = next(w for w in stack.workers() if w.role == "decode")
    assert decode.kv_pool_bytes >= 64 << 20 and decode.max_model_len == 2048
    (link,) = decode.links
    assert link.worker_id == "prefill-0" and link.lane and link.num_bytes > 0
    print(f"{choice}: {sum(len(tokens) for tokens, _ in answers)} tokens equal, none excused")
