"""One attempt: a call of Decode, from its request to the meaning of its end.

    GenerationState --> DecodeRequest --> D ... tokens --> Output.push --> Delta ...
                                          '--> finished, or lost: Unavailable, and another attempt
                                               may help

An attempt gets all tokens of the earlier ones. Closing the generator cancels the call of D.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, replace
from functools import partial

import grpc

from coordinator.cluster.membership import Membership
from coordinator.generation.dispatch import Dispatch
from coordinator.generation.events import Delta, Ending
from coordinator.generation.output import Output
from coordinator.generation.state import GenerationState
from coordinator.routing.affinity import affinity_token_of
from coordinator.routing.policy import Plan
from engine.base.errors import (
    DeadlineExceeded,
    DiptychError,
    InvalidRequest,
    Mismatch,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    WorkerLost,
)
from engine.base.types import FinishReason, StopParams
from engine.pb.diptych.internal.v1 import worker_pb2, worker_pb2_grpc
from engine.rpc import convert
from engine.rpc.auth import ClusterToken
from engine.rpc.channel import ChannelPool
from engine.rpc.liveness import next_message
from engine.rpc.status import DETAILS_KEY, from_rpc_error

# gRPC's own statuses when a connection or a process goes away in the middle of a call.
_LOST_CODES = (
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.UNIMPLEMENTED,
)


@dataclass(eq=False)
class DecodeClient:
    """Calls decode workers. Owns the channels to them; lives on the event loop."""

    membership: Membership
    token: ClusterToken | None = None
    _closed: bool = False

    def __post_init__(self) -> None:
        self._channels = ChannelPool(self.token)

    async def close(self) -> None:
        """Close the channels to workers; attempts on them are lost."""
        self._closed = True
        await self._channels.close()

    async def attempt(
        self, state: GenerationState, plan: Plan, dispatch: Dispatch
    ) -> AsyncGenerator[Delta, None]:
        """New tokens, until the output has ended.

        Raises Unavailable if another attempt may help, DeadlineExceeded, or the worker's error.
        """
        output = state.output
        with ExitStack() as assigned, ExitStack() as until_first_token:
            assigned.enter_context(self.membership.assigned(plan.decode, 0))
            computes = plan.prefill or plan.decode
            # The other choices find the prompt's blocks with choice 0.
            num_tokens = 0 if state.request.index else state.num_tokens
            until_first_token.enter_context(self.membership.assigned(computes, num_tokens))
            affinity_token = affinity_token_of(plan.decode)
            try:
                async with aclosing(self._responses(state, plan, dispatch)) as responses:
                    async for response in responses:
                        if response.HasField("tokens"):
                            until_first_token.close()
                            delta = await state.take(response.tokens)
                            if delta.token_ids:
                                yield replace(delta, affinity_token=affinity_token)
                                affinity_token = ""  # once is enough
                            if output.ended_here:
                                return
                        elif response.HasField("finished"):
                            state.report(response.finished)
                            _take_ending(output, response.finished)
                            return
                if output.ending is None:
                    raise Unavailable("the decode worker ended its stream before the answer")
            except grpc.aio.AioRpcError as error:
                if output.ending is None:
                    _raise_meaning(error, output, dispatch)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not self._closed or (task and task.cancelling()):
                    raise
                raise Unavailable("the channels to workers were closed") from None

    async def _responses(
        self, state: GenerationState, plan: Plan, dispatch: Dispatch
    ) -> AsyncGenerator[worker_pb2.DecodeResponse, None]:
        """Messages of a call of Decode, or of a second one where D lacks the shared parts."""
        parts, incarnation = state.shared_parts, plan.decode.peer.incarnation
        name = f"decode worker {plan.decode.peer.worker_id}"
        since_stall_s = partial(self.membership.since_stall_s, plan.decode.peer)
        while True:
            carries = await parts.turn(incarnation, dispatch.remaining_s())
            is_unknown = False
            call = None
            try:
                request = _decode_request(state, plan, carries)
                call = self._stub(plan).Decode(request, timeout=dispatch.remaining_s())
                del request  # it may be large, and the call long
                read = partial(next_message, call, name, since_stall_s=since_stall_s)
                while (response := await read()) is not None:
                    if is_unknown := response.HasField("unknown"):
                        break
                    if carries:
                        parts.arrived(incarnation)
                    yield response
            finally:
                if carries:
                    parts.end_turn(incarnation)
                if call is not None:
                    call.cancel()
            if not is_unknown:
                return
            if carries:
                raise Unavailable("the decode worker does not take the request's shared parts")
            parts.forgotten(incarnation)

    def _stub(self, plan: Plan) -> worker_pb2_grpc.DecodeServiceStub:
        """Of the plan's decode worker; closes the channels to workers that have gone."""
        self._channels.keep_only({w.peer.address for w in self.membership.snapshot()})
        return worker_pb2_grpc.DecodeServiceStub(self._channels.get(plan.decode.peer.address))


def _decode_request(
    state: GenerationState, plan: Plan, carries: bool = True
) -> worker_pb2.DecodeRequest:
    """One call's message; `carries`: with the shared parts, else the worker has them."""
    request, output = state.request, state.output
    sampling = request.sampling if carries else replace(request.sampling, logit_bias=())
    constraint = request.constraint if carries else None
    stop = StopParams(
        max_tokens=output.max_tokens,
        min_tokens=min(request.min_tokens, output.max_tokens),
        stop_token_ids=request.stop_token_ids if carries else frozenset(),
    )
    return worker_pb2.DecodeRequest(
        request_id=request.request_id,
        shared_key=state.shared_parts.key,
        prompt_token_ids=state.prompt if carries else (),
        output_token_ids=output.token_ids,
        sampling=convert.sampling_to_pb(sampling),
        stop=convert.stop_to_pb(stop),
        prefill=convert.to_pb(worker_pb2.PrefillPeer, plan.prefill.peer) if plan.prefill else None,
        cache_salt=request.cache_salt,
        priority=request.priority,
        incarnation=plan.decode.peer.incarnation,
        num_logprobs=request.num_logprobs,
        num_prompt_logprobs=request.num_prompt_logprobs if state.scores_prompt else None,
        constraint=convert.to_pb(worker_pb2.Constraint, constraint) if constraint else None,
    )


def _take_ending(output: Output, finished: worker_pb2.DecodeFinished) -> None:
    """Why the output ended, where its tokens alone do not show it."""
    if output.ending is not None:
        return
    reason = convert.enum_from_pb(FinishReason, finished.finish_reason, FinishReason.ABORTED)
    if reason is FinishReason.ABORTED:
        raise Unavailable("the decode worker gave the answer up")
    matched = finished.HasField("matched_stop_token")
    output.ending = Ending(reason, finished.matched_stop_token if matched else None)


def _raise_meaning(error: grpc.aio.AioRpcError, output: Output, dispatch: Dispatch) -> None:
    """Raise what a worker's status means for this request."""
    meaning = meaning_of(error, num_emitted=len(output.token_ids))
    if meaning is None:
        raise RuntimeError(f"decode worker: {error.code().name}: {error.details()}") from error
    if isinstance(meaning, DeadlineExceeded):
        dispatch.remaining_s()  # raises where it was the request's own deadline
        raise Unavailable(meaning.message) from None
    raise meaning from None


def meaning_of(error: grpc.aio.AioRpcError, *, num_emitted: int) -> DiptychError | None:
    """What a worker's status means for the request: Unavailable is tried again, None is a bug.

    After the first token a full worker is no reason to give up: the next attempt may find room.
    """
    meaning = from_rpc_error(error)
    is_by_worker = DETAILS_KEY in dict(error.trailing_metadata() or ())  # else by gRPC itself
    match meaning:
        case Unavailable() if not is_by_worker:
            return WorkerLost(meaning.message)
        case Unavailable() | InvalidRequest() | DeadlineExceeded():
            return meaning
        case Overloaded():
            return Unavailable(meaning.message) if num_emitted else meaning
        case Mismatch() | Unauthenticated() | PermissionDenied():  # another worker may accept it
            return Unavailable(meaning.message)
    is_internal = error.code() is grpc.StatusCode.INTERNAL and not is_by_worker
    if error.code() in _LOST_CODES or is_internal:
        return WorkerLost(f"{error.code().name}: {error.details()}")
    return None
