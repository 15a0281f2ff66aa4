"""Log-probabilities and the prompt's, over real processes: equal to transformers' in fp32, and in
the default stack the same bits with and without drafts, cached, preempted, after a death.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.kernels import kernels
from engine.pb.diptych.v1 import inference_pb2
from tests.support.greedy import GREEDY
from tests.support.reference_model import default_model, logits_of
from tests.support.scored import Whole, ask
from tests.support.stack import DEFAULT, SharedStacks, Stack, stub

TEXTS = [case["prompt"] for case in GREEDY]
LONG = next(text for text in TEXTS if len(text) >= 1000)
TOLERANCE = 3e-4  # of a log-probability; measured: 3.5e-5
Logits = Callable[[tuple[int, ...]], torch.Tensor]
pytestmark = pytest.mark.timeout(600)
needs_kernels = pytest.mark.skipif(kernels() is None, reason="needs our CPU kernels")


@pytest.fixture(scope="module")
def reference() -> Logits:
    """The logits of tokens by transformers, computed once."""
    model = default_model()
    return cache(lambda tokens: logits_of(model, tokens))


def request(
    prompt: Sequence[int], max_tokens: int, seed: int = -1, **fields: Any
) -> dict[str, Any]:
    """A greedy request, or a sampled one if there is a seed."""
    sampling = inference_pb2.Sampling()
    if seed >= 0:
        sampling = inference_pb2.Sampling(temperature=0.9, top_p=0.95, seed=seed)
    return {
        "token_ids": inference_pb2.TokenIds(ids=prompt),
        "sampling": sampling,
        "stop": inference_pb2.Stop(max_tokens=max_tokens, ignore_eos=max_tokens > 0),
        **fields,
    }


def output(**fields: Any) -> inference_pb2.Output:
    return inference_pb2.Output(**fields)


def assert_scores(scores: Sequence[Any], logits: torch.Tensor, tokens: Sequence[int]) -> float:
    """Row i of `logits` gives `tokens[i]`; returns the largest difference."""
    assert len(scores) == len(tokens) == len(logits)
    exact = logits.double().log_softmax(1)
    worst = 0.0
    for (chosen, ids, logprobs), row, token in zip(scores, exact, tokens, strict=True):
        worst = max(worst, abs(chosen - float(row[token])))
        assert list(logprobs) == sorted(logprobs, reverse=True)
        best = row.topk(len(ids)) if ids else None
        for i, (token_id, logprob) in enumerate(zip(ids, logprobs, strict=True)):
            worst = max(worst, abs(logprob - float(row[token_id])))
            assert best is not None
            assert float(row[token_id]) >= float(best.values[i]) - TOLERANCE  # ties may swap
    assert worst < TOLERANCE
    return worst


def check(reference: Logits, asked: dict[str, Any], got: Whole) -> float:
    prompt = list(asked["token_ids"].ids)
    worst = 0.0
    for choice in got.choices.values():
        tokens = choice.token_ids
        logits = reference((*prompt, *tokens))
        if asked["output"].HasField("logprobs"):
            at = logits[len(prompt) - 1 : -1]
            worst = max(worst, assert_scores(choice.scores, at, tokens))
        if got.prompt_scores:
            at = logits[: len(prompt) - 1]
            worst = max(worst, assert_scores(got.prompt_scores, at, prompt[1:]))
    return worst


def run(address: str, requests: Sequence[dict[str, Any]]) -> list[Whole]:
    """All at once."""

    async def all_of_them() -> list[Whole]:
        channel, service = stub(address)
        try:
            return list(await asyncio.gather(*(ask(service, **fields) for fields in requests)))
        finally:
            await channel.close()

    return asyncio.run(all_of_them())


def mixed() -> list[dict[str, Any]]:
    """Greedy and sampled, prompts that share beginnings, some to be scored, one of two choices."""
    return [
        request(LONG[:200], 40, output=output(logprobs=5)),
        request(LONG[:200], 40, 3, output=output(logprobs=0)),
        request(LONG[:333], 24, 4, output=output(logprobs=20, prompt_logprobs=3)),
        request(LONG[:48], 32, 5, n=2, output=output(logprobs=1, prompt_logprobs=0)),
        request(LONG[:17], 8, output=output(prompt_logprobs=1)),
        request(LONG[:600], 0, output=output(prompt_logprobs=2, echo=True)),
    ]


def scores_of(whole: Whole) -> Any:
    choices = {i: (c.token_ids, c.scores) for i, c in whole.choices.items()}
    return choices, whole.prompt_scores


def test_equal_to_transformers_and_cached_prefixes_too(stack: Stack, reference: Logits) -> None:
    requests = mixed()
    worst = 0.0
    for _ in range(2):  # the second time everything is cached
        for asked, got in zip(requests, run(stack.address, requests), strict=True):
            worst = max(worst, check(reference, asked, got))
    print(f"largest difference to transformers: {worst:.1e}")
    stack.assert_at_rest()
    last = run(stack.address, requests[-1:])[0]
    assert last.prompt is not None
    assert list(last.prompt.token_ids) == LONG[:600]
    assert last.only.finished is not None
    assert last.only.finished.finish_reason == inference_pb2.FINISH_REASON_LENGTH
    # Without log-probabilities a request gets the same tokens, from the cache.
    plain = run(stack.address, [request(LONG[:333], 24, 4)])[0]
    again = run(stack.address, requests[2:3])[0]
    assert plain.only.token_ids == again.only.token_ids
    assert plain.only.finished is not None
    assert plain.only.finished.usage.cached_tokens == 320
    stack.assert_at_rest()


@needs_kernels
def test_the_same_bits_with_and_without_drafts_after_preemption_and_a_death(
    tmp_path: Path, stacks: SharedStacks
) -> None:
    # Two of the last three do not fit into the crowded pool of 56 blocks beside one another.
    requests = mixed() + [
        request(LONG[i : i + 24], 440, i, output=output(logprobs=3)) for i in range(3)
    ]
    with ExitStack() as running:

        def start(name: str, *flags: str, decode: int = 1) -> Stack:
            (folder := tmp_path / name).mkdir()
            stack = Stack(folder, "--max-model-len", "704", *flags, decode=decode, wait=False)
            return running.enter_context(stack)

        def add_answers(stack: Stack, must_grow: str = "") -> None:
            """Answers again, a few times, until what depends on timing has happened as well."""
            stack.until_ready()
            before = stack.metrics("decode").get(must_grow, 0)
            for _ in range(5):
                answers.append([scores_of(each) for each in run(stack.address, requests)])
                stack.assert_at_rest()
                if not must_grow or stack.metrics("decode").get(must_grow, 0) > before:
                    return
            raise AssertionError(f"{must_grow} did not grow")

        # They start side by side, while the shared stack answers.
        plain = start("plain", "--drafter", "none")
        crowded = start("crowded", "--kv-cache-memory", "20MiB")
        deaths = start("deaths", decode=2)
        answers: list[list[Any]] = []
        accepted = "diptych_spec_decode_num_accepted_tokens_total"
        add_answers(stacks.get(*DEFAULT), accepted)
        add_answers(plain)
        add_answers(crowded, "diptych_num_preemptions_total")
        assert plain.metrics("decode").get(accepted, 0) == 0
        deaths.until_ready()
        answers.append(asyncio.run(with_a_death(deaths, requests)))
    for number, first in enumerate(answers[0]):
        for other in answers[1:]:
            assert other[number] == first, f"request {number}"


async def with_a_death(stack: Stack, requests: Sequence[dict[str, Any]]) -> list[Any]:
    """The answers, while the decode worker that has more of them is killed in mid-stream."""
    channel, service = stub(stack.address)
    try:
        tasks = [asyncio.create_task(ask(service, **fields)) for fields in requests]
        busy = stack.workers("decode")
        for _ in range(200):
            busy = stack.workers("decode")
            if any(w.num_running >= 3 for w in busy):
                break
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.3)
        victim = max(busy, key=lambda w: w.num_running)
        assert not all(task.done() for task in tasks)
        os.kill(stack.pid_of(victim.worker_id), signal.SIGKILL)
        return [scores_of(whole) for whole in await asyncio.gather(*tasks)]
    finally:
        await channel.close()
