"""The default model's first 8 layers draft for it, through both panels and real NIXL: fp32 answers
equal the oracle of one process, and a worker without the draft model is refused.
"""

from __future__ import annotations

import concurrent.futures
import random
from pathlib import Path

import pytest
import torch

from engine.base.kv_layout import hash_salt
from engine.base.types import FinishReason, SamplingParams, StopParams
from engine.checkpoint.source import resolve, weights
from engine.runner.loader import load_model
from engine.scheduling.request import EngineRequest
from tests.support.commands import run_command
from tests.support.greedy import GREEDY
from tests.support.near_tie import TALLY
from tests.support.paged import CPU
from tests.support.plain_loop import PlainLoop
from tests.support.recorded import Answer, RecordedAnswers
from tests.support.stack import Stack

BLOCK_BYTES = (30 + 8) * 2 * 3 * 16 * 64 * 4
EXACT = ("--dtype", "float32", "--kv-cache-memory", "384MiB", "--max-model-len", "1024")
pytestmark = pytest.mark.timeout(600)


def make_works() -> list[EngineRequest]:
    """Prompts of 20 to 300 tokens, some with a common beginning, half of them sampled."""
    rng = random.Random(8)
    texts = [item["prompt"] for item in GREEDY if len(item["prompt"]) >= 300][:3]
    works = []
    for i in range(12):
        text = rng.choice(texts)
        prompt = tuple(text[: rng.choice([20, 100, 200, 300])])
        sampling = SamplingParams(
            temperature=0.75 if i % 2 else 0.0,
            top_p=0.875 if i % 2 else 1.0,
            repetition_penalty=rng.choice([1.0, 1.125]),
            seed=rng.getrandbits(64),
        )
        stop = StopParams(max_tokens=rng.randint(20, 40), stop_token_ids=frozenset({2}))
        works.append(EngineRequest(f"draft{i}", prompt, hash_salt(digest="x"), sampling, stop))
    return works


def ask(stack: Stack, work: EngineRequest) -> Answer:
    assert work.sampling
    assert work.stop
    tokens, _, done = stack.generate(
        work.prompt,
        temperature=work.sampling.temperature,
        top_p=work.sampling.top_p,
        repetition_penalty=work.sampling.repetition_penalty,
        seed=work.sampling.seed,
        max_tokens=work.stop.max_tokens,
    )
    return Answer(tuple(tokens), FinishReason(done.finish_reason))


def _oracle() -> PlainLoop:
    checkpoint = resolve("smollm2")
    shards = weights(checkpoint, "float32")
    return PlainLoop(load_model(checkpoint.config, shards, torch.float32, CPU))


def test_the_first_layers_draft_and_no_token_changes(tmp_path: Path, record_answers: bool) -> None:
    works = make_works()
    oracle = RecordedAnswers("draft_model_fp32", _oracle)
    if record_answers:
        oracle.record(works)
    flags = ("--drafter", "model", "--draft-model", "first:8", "--draft-tokens", "4")
    with Stack(tmp_path, *EXACT, *flags) as stack:
        with concurrent.futures.ThreadPoolExecutor(7) as pool:
            without_draft = ("--dtype", "float32", "--kv-cache-memory", "32MiB")
            place = ("--coordinator", stack.address, stack.token_flag())
            other = pool.submit(
                run_command, "worker.cli", "prefill", "start", *without_draft, *place
            )
            answers = list(pool.map(lambda work: ask(stack, work), works))
            refused = other.result()
        for work, got in zip(works, answers, strict=True):
            verdict = oracle.judge(work, got.tokens, got.reason)
            assert verdict.ok, verdict.detail
        stack.assert_at_rest()
        decode, prefill = stack.metrics("decode"), stack.metrics("prefill")
        assert decode["diptych_spec_decode_num_draft_tokens_total"] > 20
        moved = decode["diptych_kv_transfer_blocks_total"]
        assert moved > 20
        assert decode["diptych_kv_transfer_bytes_total"] == moved * BLOCK_BYTES
        assert decode["diptych_kv_stale_reads_total"] == 0
        assert prefill["diptych_prompt_tokens_total"] > 500
        print(TALLY, {k: v for k, v in decode.items() if "spec_decode" in k and "created" not in k})
        assert refused.returncode == 2, refused.stderr[-2000:]
        assert "refused" in refused.stderr and "draft=" in refused.stderr
