"""64 mixed requests over the public API: what tests/system compares with an oracle, in fp32 and in
the default stack.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

from engine.base.kv_layout import hash_salt
from engine.base.types import FinishReason, SamplingParams, StopParams
from engine.pb.diptych.v1 import inference_pb2
from engine.scheduling.request import EngineRequest
from tests.support.greedy import GREEDY
from tests.support.stack import stub

_REASONS = {
    inference_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    inference_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


@dataclass(frozen=True, slots=True)
class MixedCase:
    """One request, and after how many tokens its caller cancels it (-1: never)."""

    work: EngineRequest
    cancel_after: int


def _cases() -> list[MixedCase]:
    """Prompts of 10 to 1,500 tokens, half of them sampled, one in eight cancelled midway."""
    rng = random.Random(64)
    texts = [case["prompt"] for case in GREEDY]
    lengths = [1500, 1500, 1000, 700] + [rng.choice([10, 20, 40, 80, 129, 256]) for _ in range(60)]
    cases = []
    for i, length in enumerate(lengths):
        text = rng.choice([t for t in texts if len(t) >= length])
        sampled = i % 2 == 1
        sampling = SamplingParams(
            temperature=rng.choice([0.5, 0.75, 1.25]) if sampled else 0.0,
            top_p=rng.choice([1.0, 0.875]) if sampled else 1.0,
            top_k=rng.choice([0, 40]) if sampled else 0,
            min_p=rng.choice([0.0, 0.0625]) if sampled else 0.0,
            repetition_penalty=rng.choice([1.0, 1.125]),
            presence_penalty=rng.choice([0.0, 0.5]),
            frequency_penalty=rng.choice([0.0, 0.25]),
            seed=rng.getrandbits(64),
            logit_bias=rng.choice([(), ((198, -100.0), (28, 2.5))]),
        )
        stop = StopParams(
            max_tokens=rng.randint(6, 20),
            min_tokens=rng.choice([0, 4]),
            stop_token_ids=frozenset({2, 30} if i % 4 == 3 else {2}),
        )
        work = EngineRequest(
            f"case{i}", tuple(text[:length]), hash_salt(digest="x"), sampling, stop
        )
        cases.append(MixedCase(work, rng.randint(1, 5) if i % 8 == 5 else -1))
    return cases


CASES = _cases()


def request_of(work: EngineRequest) -> inference_pb2.GenerateRequest:
    """The public form of a request."""
    s, stop = work.sampling, work.stop
    assert s
    assert stop
    return inference_pb2.GenerateRequest(
        request_id=work.request_id,
        token_ids=inference_pb2.TokenIds(ids=work.prompt),
        sampling=inference_pb2.Sampling(
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
            frequency_penalty=s.frequency_penalty,
            presence_penalty=s.presence_penalty,
            repetition_penalty=s.repetition_penalty,
            seed=s.seed,
            logit_bias=dict(s.logit_bias),
        ),
        stop=inference_pb2.Stop(
            max_tokens=stop.max_tokens,
            min_tokens=stop.min_tokens,
            stop_token_ids=sorted(stop.stop_token_ids - {2}),
        ),
    )


async def ask_all(address: str) -> list[tuple[list[int], FinishReason | None]]:
    """(tokens, reason) of each case, all sent at once; no reason where the caller cancelled."""
    channel, service = stub(address)

    async def ask(case: MixedCase) -> tuple[list[int], FinishReason | None]:
        call = service.Generate(request_of(case.work), timeout=600)
        token_ids: list[int] = []
        async for response in call:
            if response.HasField("finished"):
                return token_ids, _REASONS[response.finished.finish_reason]
            token_ids += response.delta.token_ids
            if 0 <= case.cancel_after <= len(token_ids):
                call.cancel()
                return token_ids, None
        raise AssertionError("a stream without an end")

    try:
        return await asyncio.gather(*(ask(case) for case in CASES))
    finally:
        await channel.close()
