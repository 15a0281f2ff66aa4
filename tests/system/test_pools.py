"""Pools that are too small, and pools that are missing: slower, never stuck, never wrong."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from coordinator.client import AsyncClient, TextDelta
from tests.support.cluster import BLOCK_BYTES, exact
from tests.support.greedy import GREEDY, greedy
from tests.support.stack import QUICK, SharedStacks, Stack

LONG = [case for case in GREEDY if len(case["prompt"]) >= 1000]
pytestmark = pytest.mark.timeout(300)


async def ask_all(address: str, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    async with AsyncClient(address) as client:

        async def ask(prompt: list[int]) -> list[int]:
            tokens: list[int] = []
            async for event in client.generate(prompt, timeout_s=240, max_tokens=max_tokens):
                if isinstance(event, TextDelta):
                    tokens += event.token_ids
            return tokens

        return await asyncio.gather(*(ask(prompt) for prompt in prompts))


def test_eight_long_prompts_in_pools_for_two_all_finish(tmp_path: Path) -> None:
    """400 tokens are 25 blocks and a tail of 16; each pool holds two such requests and no third."""
    prompts = [case["prompt"][start : start + 416] for case in LONG for start in (0, 200, 400)][:8]
    assert len(prompts) == 8
    flags = (*exact(), "--max-model-len", "430", "--kv-cache-memory", str(56 * BLOCK_BYTES))
    with Stack(tmp_path, *flags) as stack:
        alone = asyncio.run(ask_all(stack.address, prompts[:1], 8))
        together = asyncio.run(ask_all(stack.address, prompts, 8))
        assert together[0] == alone[0]
        assert all(len(tokens) == 8 for tokens in together)
        assert all(w.total_blocks == 56 for w in stack.workers())
        stack.assert_at_rest()


def test_without_a_prefill_worker_the_decode_worker_computes_the_prompt(
    tmp_path: Path, stacks: SharedStacks
) -> None:
    prompt = greedy(300)["prompt"]
    expected = stacks.get(*QUICK).generate(prompt, max_tokens=24)[0]
    with Stack(tmp_path, *QUICK, prefill=0) as stack:
        tokens, _, done = stack.generate(prompt, max_tokens=24)
        assert tokens == expected
        assert done.timing.kv_transfer == 0
        assert stack.metrics("decode")["diptych_prompt_tokens_total"] == 300
        stack.assert_at_rest()
