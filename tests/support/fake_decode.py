"""A DecodeService that writes a given answer, on a real port, and fails on cue.

Used only to script deaths, delays and refusals; the token at a position is always the same, so that
a doubled or missing one is seen.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from engine.base.errors import DiptychError
from engine.base.types import ModelIdentity, Peer
from engine.pb.diptych.internal.v1 import worker_pb2
from engine.pb.diptych.v1 import inference_pb2
from engine.rpc.server import RpcServer


@dataclass
class Cue:
    """What happens in one call: after `after` new tokens it raises `error`, or vanishes."""

    after: int = 0
    error: Exception | None = None
    vanish: bool = False  # the process is gone: its port is closed under the call


@dataclass
class FakeDecode:
    """One scripted worker."""

    answer: list[int]
    name: str = "d0"
    group: int = 3  # tokens a message
    pace_s: float = 0.0
    cues: list[Cue] = field(default_factory=list)  # one a call; without: it goes well
    requests: list[worker_pb2.DecodeRequest] = field(default_factory=list)
    deadlines: list[float | None] = field(default_factory=list)
    peer: Peer | None = None
    by_seed: dict[int, list[int]] = field(default_factory=dict)  # answers of other seeds
    shared: dict[bytes, worker_pb2.DecodeRequest] = field(default_factory=dict)
    num_carried: int = 0  # calls that brought what the choices share
    num_unknown: int = 0  # calls that brought a key which is not in `shared`
    sends_alive: bool = True  # while it waits, as an engine that computes
    ends_by_itself: bool = False  # after all of the answer, as one of a grammar does

    def __post_init__(self) -> None:
        self.cancelled = asyncio.Event()
        self._server = RpcServer()
        descriptor = worker_pb2.DESCRIPTOR.services_by_name["DecodeService"]
        self._server.add_service(descriptor, self, alive=self._alive)
        self._vanished: asyncio.Task[None] | None = None

    async def start(self, incarnation: str = "i0") -> None:
        port = self._server.listen("127.0.0.1:0")
        await self._server.start()
        self.peer = Peer(self.name, incarnation, f"127.0.0.1:{port}")

    async def stop(self) -> None:
        await self._server.stop()

    def _alive(self, request: Any) -> worker_pb2.DecodeResponse | None:
        return worker_pb2.DecodeResponse(alive=worker_pb2.Alive()) if self.sends_alive else None

    async def Decode(self, request: Any, context: Any) -> Any:
        if request.shared_key and not request.prompt_token_ids:
            parts = self.shared.get(request.shared_key)
            if parts is None:
                self.num_unknown += 1
                yield worker_pb2.DecodeResponse(unknown=worker_pb2.Unknown())
                return
            request.prompt_token_ids.extend(parts.prompt_token_ids)
            request.stop.stop_token_ids.extend(parts.stop.stop_token_ids)
        elif request.shared_key:
            self.shared[request.shared_key] = request
            self.num_carried += 1
            yield worker_pb2.DecodeResponse(alive=worker_pb2.Alive())
        self.requests.append(request)
        self.deadlines.append(context.time_remaining())
        cue = self.cues.pop(0) if self.cues else None
        answer = self.by_seed.get(request.sampling.seed, self.answer)
        position, sent = len(request.output_token_ids), 0
        assert list(request.output_token_ids) == answer[:position]
        end = min(len(answer), request.stop.max_tokens)
        told = []
        if request.HasField("num_prompt_logprobs"):
            count = request.num_prompt_logprobs
            told = [scored(i, count) for i in range(1, len(request.prompt_token_ids))]
        try:
            if not end and told:
                tokens = worker_pb2.Tokens(prompt_logprobs=told)
                yield worker_pb2.DecodeResponse(tokens=tokens)
            while position < end:
                if cue and sent >= cue.after:
                    await self._fail(cue)
                step = min(self.group, end - position, cue.after - sent if cue else self.group)
                ids = answer[position : position + step]
                logprobs = []
                if request.HasField("num_logprobs"):
                    places = range(position, position + step)
                    logprobs = [scored(i, request.num_logprobs) for i in places]
                position, sent = position + step, sent + step
                await asyncio.sleep(self.pace_s)
                tokens = worker_pb2.Tokens(
                    token_ids=ids,
                    draft_tokens=sent,
                    accepted_tokens=1,
                    logprobs=logprobs,
                    prompt_logprobs=told,
                )
                told = []
                yield worker_pb2.DecodeResponse(tokens=tokens)
            if cue:
                await self._fail(cue)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        except GeneratorExit:
            self.cancelled.set()
            raise
        last = answer[position - 1]
        stopped = position and last in request.stop.stop_token_ids
        reason = inference_pb2.FINISH_REASON_LENGTH
        if self.ends_by_itself and position == len(answer):
            reason = inference_pb2.FINISH_REASON_STOP
        finished = worker_pb2.DecodeFinished(
            finish_reason=inference_pb2.FINISH_REASON_STOP if stopped else reason,
            matched_stop_token=last if stopped else None,
            cached_tokens=1,
            draft_tokens=sent,
            accepted_tokens=1,
            queue_s=0.25,
            prefill_s=0.5,
            kv_transfer_s=0.125,
        )
        yield worker_pb2.DecodeResponse(finished=finished)

    async def _fail(self, cue: Cue) -> None:
        if cue.vanish:
            self._vanished = asyncio.create_task(self._server.stop())
            await asyncio.sleep(30)
        assert cue.error is not None
        raise cue.error


def scored(position: int, count: int) -> worker_pb2.Logprobs:
    """The log-probabilities of the token at `position`; each position has its own."""
    return worker_pb2.Logprobs(
        chosen=-position / 8,
        token_ids=range(1000 + position, 1000 + position + count),
        logprobs=[-position - i / 8 for i in range(count)],
    )


def identity(model: str = "smollm2", **changes: Any) -> ModelIdentity:
    values: dict[str, Any] = {
        "name": model,
        "digest": "00",
        "numeric_profile": "exact",
        "max_model_len": 8192,
        "block_size": 16,
        "vocab_size": 49152,
    }
    return ModelIdentity(**{**values, **changes})


def lost(message: str = "gone", peer: str = "") -> DiptychError:
    from engine.base.errors import Unavailable

    return Unavailable(message, lost=peer)
