"""A decode worker for the fuzz, on a real port: it answers anything at once, and fails on what a
coordinator must not let through, for nothing behind the public door checks a range again.

`FakeDecode` has one answer for all; here the token at a position is a function of (seed, position).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from engine.base.types import ModelIdentity, Peer
from engine.pb.diptych.internal.v1 import worker_pb2
from engine.pb.diptych.v1 import inference_pb2
from engine.rpc.server import RpcServer

_MOST_SOURCE = 1 << 20
_MIN_PENALTY, _MAX_PENALTY = 0.999e-3, 1.001e3  # 32-bit floats on the wire


class FuzzDecode:
    """One worker. `breaches`: what the coordinator let through, and how often."""

    def __init__(self, identity: ModelIdentity, eos_token_id: int) -> None:
        self.breaches: Counter[str] = Counter()
        self.num_running = 0
        self.num_answers = 0
        self._identity = identity
        self._eos = eos_token_id
        self._server = RpcServer()
        descriptor = worker_pb2.DESCRIPTOR.services_by_name["DecodeService"]
        self._server.add_service(descriptor, self)

    async def start(self) -> Peer:
        """Listen; returns the worker's peer entry."""
        port = self._server.listen("127.0.0.1:0")
        await self._server.start()
        return Peer("d0", "of-d0", f"127.0.0.1:{port}")

    async def stop(self) -> None:
        """End."""
        await self._server.stop()

    async def Decode(
        self, request: worker_pb2.DecodeRequest, context: Any
    ) -> AsyncIterator[worker_pb2.DecodeResponse]:
        self.num_answers += 1
        self.num_running += 1
        try:
            self._check(request)
            for response in self._answer(request):
                yield response
        finally:
            self.num_running -= 1

    def _answer(self, request: worker_pb2.DecodeRequest) -> list[worker_pb2.DecodeResponse]:
        """As a worker would: tokens in groups, until a stop token or max_tokens."""
        stops, seed = set(request.stop.stop_token_ids), request.sampling.seed
        position, tokens, stopped = len(request.output_token_ids), [], None
        while position < request.stop.max_tokens and stopped is None:
            token = self._token(seed, position)
            if position < request.stop.min_tokens and token in stops:
                token = next(t for t in range(self._identity.vocab_size) if t not in stops)
            tokens.append(token)
            stopped = token if token in stops else None
            position += 1
        group = 1 + seed % 7
        messages = [
            worker_pb2.Tokens(
                token_ids=tokens[i : i + group],
                cached_tokens=1,
                draft_tokens=2 + i,
                logprobs=[_scored(request.num_logprobs) for _ in tokens[i : i + group]]
                if request.HasField("num_logprobs")
                else (),
            )
            for i in range(0, len(tokens), group)
        ]
        if request.HasField("num_prompt_logprobs"):
            messages = messages or [worker_pb2.Tokens()]
            told = (_scored(request.num_prompt_logprobs) for _ in request.prompt_token_ids[1:])
            messages[0].prompt_logprobs.extend(told)
        responses = [worker_pb2.DecodeResponse(tokens=tokens) for tokens in messages]
        finished = worker_pb2.DecodeFinished(
            finish_reason=inference_pb2.FINISH_REASON_LENGTH
            if stopped is None
            else inference_pb2.FINISH_REASON_STOP,
            matched_stop_token=stopped,
            cached_tokens=1,
            draft_tokens=2 + len(tokens),
        )
        return [*responses, worker_pb2.DecodeResponse(finished=finished)]

    def _token(self, seed: int, position: int) -> int:
        mixed = (seed ^ position * 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9 % 2**64
        return self._eos if mixed >> 58 == 0 else (mixed >> 20) % self._identity.vocab_size

    def _check(self, request: worker_pb2.DecodeRequest) -> None:
        """Raise where a value is out of the range that workers count on."""
        sampling, stop, vocab_size = request.sampling, request.stop, self._identity.vocab_size
        prompt, output = request.prompt_token_ids, request.output_token_ids
        rules = {
            "incarnation": request.incarnation == "of-d0",
            "request_id": 0 < len(request.request_id) <= 128,
            "prompt": len(prompt) > 0,
            "length": len(prompt) + stop.max_tokens <= self._identity.max_model_len,
            "output": len(output) < stop.max_tokens or not (output or stop.max_tokens),
            "max_tokens": stop.max_tokens > 0 or request.HasField("num_prompt_logprobs"),
            "logprobs": request.num_logprobs <= 20 and request.num_prompt_logprobs <= 20,
            "tokens": all(t < vocab_size for ids in (prompt, output) for t in ids),
            "stop tokens": all(t < vocab_size for t in stop.stop_token_ids),
            "min_tokens": stop.min_tokens <= stop.max_tokens,
            "temperature": 0 <= sampling.temperature < math.inf,
            "top_p": 0 < sampling.top_p <= 1,
            "min_p": 0 <= sampling.min_p <= 1,
            "frequency_penalty": abs(sampling.frequency_penalty) <= 2,
            "presence_penalty": abs(sampling.presence_penalty) <= 2,
            "repetition_penalty": _MIN_PENALTY <= sampling.repetition_penalty <= _MAX_PENALTY,
            "logit_bias": all(
                t < vocab_size and abs(value) <= 100 for t, value in sampling.logit_bias.items()
            ),
            "cache_salt": len(request.cache_salt) <= 1024,
            "constraint": _is_bounded(request.constraint),
        }
        broken = [name for name, holds in rules.items() if not holds]
        self.breaches.update(broken)
        assert not broken, f"the coordinator let through: {', '.join(broken)}"


def _is_bounded(constraint: worker_pb2.Constraint) -> bool:
    """That it can be compiled the coordinator has tried; a worker is spared what is too long."""
    return len(constraint.source) <= _MOST_SOURCE and bool(constraint.source.strip()) == bool(
        constraint.kind
    )


def _scored(count: int) -> worker_pb2.Logprobs:
    return worker_pb2.Logprobs(
        chosen=-1.0, token_ids=range(count), logprobs=[-float(i) for i in range(count)]
    )
