"""Law 1 in the default stack, as `coordinator start` runs it on a CPU: not within a bound but bit
for bit, with drafts, batches, prefix hits and either pool's steps.

The kernels give a token the same logits whatever else is in a step, so here no near-tie is excused.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from engine.checkpoint.packed import packed_file, read_packed
from engine.checkpoint.source import resolve
from engine.kernels import kernels
from engine.runner.native_model import NativeModel
from tests.support.plain_loop import PlainLoop
from tests.system.stack import Stack
from tests.system.test_answers import CASES, ask_all

LIBRARY = kernels()
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(LIBRARY is None, reason="needs our CPU kernels"),
]


@pytest.mark.parametrize("choice", ["auto", "bf16"])
def test_64_mixed_requests_equal_the_oracle_bit_for_bit(choice: str, tmp_path: Path) -> None:
    assert LIBRARY
    checkpoint = resolve("smollm2", progress=False)
    weights = read_packed(packed_file(checkpoint, choice, progress=False), checkpoint.config)
    oracle = PlainLoop(NativeModel(checkpoint.config, weights, LIBRARY))
    expected = oracle.answers([case.work for case in CASES], group=16)
    with Stack(tmp_path, "--weights", choice, "--max-model-len", "2048") as stack:
        answers = asyncio.run(ask_all(stack.address))
        num_tokens = 0
        for case, (tokens, reason), (got, got_reason) in zip(CASES, expected, answers, strict=True):
            if got_reason is None:
                tokens = tokens[: len(got)]
            assert got == tokens, case.work.request_id
            assert got_reason in (None, reason), case.work.request_id
            num_tokens += len(got)
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
        print(f"{choice}: {num_tokens} tokens equal, none excused")
