"""The protocol between gateways and vLLM over the wire, and its translation as pure functions."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest

from coordinator.api import values
from coordinator.api.values import Constraint, Output, Sampling, Stop
from coordinator.api.vllm.request import to_generate
from coordinator.api.vllm.responses import ResponseBuilder
from coordinator.generation.events import Delta, PromptEvent
from engine.base.errors import DiptychError, InvalidRequest, NotOffered
from engine.base.types import FinishReason
from engine.pb.vllm import vllm_engine_pb2 as pb
from engine.pb.vllm import vllm_engine_pb2_grpc
from engine.rpc.channel import open_channel
from tests.support.answer_events import finished, scored, usage
from tests.support.http_front import http_front, until

PROMPT = list(range(1000, 1040))
LIMIT = 8192


def request(request_id="r", *, stream=True, **params):
    values = {"temperature": 0.0, "max_tokens": 20, **params}
    return pb.GenerateRequest(
        request_id=request_id,
        tokenized=pb.TokenizedInput(input_ids=PROMPT),
        sampling_params=pb.SamplingParams(**values),
        stream=stream,
    )


def translated(made):
    return to_generate(made, "smollm2", LIMIT)


@asynccontextmanager
async def engine(**options):
    async with http_front(**options) as front:
        channel = open_channel(front.coordinator.address)
        try:
            yield front, vllm_engine_pb2_grpc.VllmEngineStub(channel)
        finally:
            await channel.close()


async def responses(call):
    return [response async for response in call]


def test_zero_is_unset_and_defaults_are_vllms():
    generate = translated(pb.GenerateRequest(text="x"))
    assert generate.text == "x"
    assert generate.sampling.temperature is None
    assert generate.sampling.default_temperature == 1.0
    for name in ("top_p", "top_k", "min_p", "repetition_penalty", "seed"):
        assert getattr(generate.sampling, name) is None, name
    assert generate.stop.max_tokens == LIMIT
    assert generate.output.skip_special_tokens is False
    assert generate.n == 1
    assert generate.output.logprobs is None
    assert translated(request()).sampling.temperature == 0.0


def test_every_field_is_carried():
    generate = translated(
        request(
            "id",
            temperature=0.5,
            top_p=0.75,
            top_k=5,
            min_p=0.125,
            frequency_penalty=0.25,
            presence_penalty=-0.25,
            repetition_penalty=1.5,
            max_tokens=7,
            min_tokens=2,
            stop=["a"],
            stop_token_ids=[3],
            skip_special_tokens=True,
            ignore_eos=True,
            n=2,
            logprobs=3,
            prompt_logprobs=0,
            seed=-1,
            include_stop_str_in_output=True,
            logit_bias={4: 1.5},
            regex="[a-z]",
        )
    )
    assert generate == values.GenerateRequest(
        request_id="id",
        model="smollm2",
        token_ids=PROMPT,
        n=2,
        sampling=Sampling(
            temperature=0.5,
            default_temperature=1.0,
            top_p=0.75,
            top_k=5,
            min_p=0.125,
            frequency_penalty=0.25,
            presence_penalty=-0.25,
            repetition_penalty=1.5,
            seed=2**64 - 1,
            logit_bias={4: 1.5},
        ),
        stop=Stop(
            max_tokens=7,
            min_tokens=2,
            stop=["a"],
            stop_token_ids=[3],
            ignore_eos=True,
            include_stop_str_in_output=True,
        ),
        output=Output(logprobs=3, prompt_logprobs=0, skip_special_tokens=True),
        constraint=Constraint("regex", "[a-z]"),
    )


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        ({"json_schema": "{}"}, Constraint("json_schema", "{}")),
        ({"json_object": True}, Constraint("json_object", True)),
        ({"json_object": False}, None),
        ({"grammar": "g"}, Constraint("grammar", "g")),
        (
            {"choice": pb.ChoiceConstraint(choices=["a", "b"])},
            Constraint("choice", ["a", "b"]),
        ),
        ({}, None),
    ],
)
def test_constraints(constraint, expected):
    generate = translated(request(**constraint))
    if expected is None:
        assert generate.constraint is None
    else:
        assert generate.constraint == expected


@pytest.mark.parametrize(
    ("made", "kind", "part"),
    [
        (pb.GenerateRequest(), InvalidRequest, "input"),
        (pb.GenerateRequest(text="x", mm_inputs={}), NotOffered, "mm_inputs"),
        (pb.GenerateRequest(text="x", extra_mm_inputs=[{}]), NotOffered, "extra_mm_inputs"),
        (pb.GenerateRequest(text="x", media_refs={}), NotOffered, "media_refs"),
        (pb.GenerateRequest(text="x", kv_transfer_params={}), NotOffered, "kv_transfer_params"),
        (
            pb.GenerateRequest(text="x", kv_transfer_params_json=""),
            NotOffered,
            "kv_transfer_params_json",
        ),
        (pb.GenerateRequest(text="x", data_parallel_rank=1), InvalidRequest, "rank 0"),
        (request(logprobs=-1), InvalidRequest, "logprobs"),
        (request(prompt_logprobs=-1), InvalidRequest, "prompt_logprobs"),
        (request(truncate_prompt_tokens=5), NotOffered, "truncate_prompt_tokens"),
        (request(structural_tag="x"), NotOffered, "structural_tag"),
        (request(logit_bias={-1: 1.0}), InvalidRequest, "logit_bias[-1]"),
    ],
)
def test_what_is_not_taken_is_refused_by_name(made, kind, part):
    with pytest.raises(DiptychError) as caught:
        translated(made)
    assert type(caught.value) is kind
    assert part in caught.value.message


def token(token_id, logprob, *top):
    return scored(token_id, "", logprob, *((i, "", value) for i, value in top))


def test_log_probabilities_of_prompt_and_answer():
    builder = ResponseBuilder(request(logprobs=2, prompt_logprobs=1, n=2))
    prompt = PromptEvent("", [5, 6], [token(6, -1.0, (6, -1.0))])
    assert not list(builder.add(prompt))
    entries = [token(7, -0.5, (7, -0.5), (8, -2.0))]
    for index in (1, 0, 1):
        ((response,)) = builder.add(Delta(index, "", [7], entries))
        chunk = response.chunk
        assert chunk.index == index
        assert list(chunk.output_logprobs.token_logprobs) == [-0.5]
        assert list(chunk.output_logprobs.top_logprobs[0].token_ids) == [7, 8]
    assert not chunk.HasField("input_logprobs"), "only with the first chunk of a choice"
    ended = finished(1, FinishReason.LENGTH, usage(2, cached=1, accepted=3))
    ((response,)) = builder.add(ended)
    complete = response.complete
    assert list(complete.output_ids) == [7, 7]
    assert list(complete.output_logprobs.token_ids) == [7, 7]
    values = complete.input_logprobs.token_logprobs
    assert [v.HasField("value") for v in values] == [False, True]
    assert list(complete.input_logprobs.token_ids) == [5, 6]
    assert [list(top.token_ids) for top in complete.input_logprobs.top_logprobs] == [[], [6]]
    assert (complete.prompt_tokens, complete.cached_tokens) == (2, 1)
    aborted = [response.complete for response in builder.abort()]
    assert [(c.index, c.finish_reason, list(c.output_ids)) for c in aborted] == [(0, "abort", [7])]


async def test_tokens_in_tokens_out_streamed_and_whole():
    async with engine() as (front, stub):
        worker = await front.worker()
        *chunks, last = await responses(stub.Generate(request(), timeout=10))
        assert [i for c in chunks for i in c.chunk.token_ids] == worker.answer[:20]
        assert all(c.chunk.completion_tokens == len(c.chunk.token_ids) for c in chunks)
        assert {c.chunk.prompt_tokens for c in chunks} == {len(PROMPT)}
        complete = last.complete
        assert list(complete.output_ids) == worker.answer[:20]
        assert (complete.finish_reason, complete.prompt_tokens) == ("length", len(PROMPT))
        assert (complete.completion_tokens, complete.cached_tokens) == (20, 1)
        assert (complete.spec_draft_tokens, complete.spec_accepted_tokens) == (20, 1)
        (whole,) = await responses(stub.Generate(request(stream=False), timeout=10))
        assert whole == last


async def test_stops_tell_what_matched():
    async with engine() as (front, stub):
        worker = await front.worker()
        stop_id = worker.answer[5]
        call = stub.Generate(request(stream=False, stop_token_ids=[stop_id]), timeout=10)
        (whole,) = await responses(call)
        assert (whole.complete.finish_reason, whole.complete.matched_token_id) == ("stop", stop_id)
        call = stub.Generate(request(stream=False, stop=["slow"]), timeout=10)
        (whole,) = await responses(call)
        assert whole.complete.matched_stop_str == "slow"


async def test_an_abort_ends_every_request_of_that_id_and_no_other():
    async with engine() as (front, stub):
        worker = await front.worker(pace_s=0.02)
        calls = [
            stub.Generate(request(name, stream=stream, max_tokens=60), timeout=10)
            for name, stream in (("a", True), ("a", False), ("b", True))
        ]
        reading = [asyncio.create_task(responses(call)) for call in calls]
        await until(lambda: front.coordinator.pipeline.num_requests == 3)
        await asyncio.sleep(0.1)
        await stub.Abort(pb.AbortRequest(request_ids=["a", "unknown"]))
        for task in reading[:2]:
            *chunks, last = await asyncio.wait_for(task, 5)
            assert last.complete.finish_reason == "abort"
            ids = list(last.complete.output_ids)
            assert ids == worker.answer[: len(ids)]
            assert len(ids) < 60
            assert not chunks or [i for c in chunks for i in c.chunk.token_ids] == ids
        *_, last = await asyncio.wait_for(reading[2], 10)
        assert last.complete.finish_reason == "length"


async def test_an_abort_over_another_connection_ends_nothing():
    async with engine() as (front, stub):
        await front.worker(pace_s=0.02)
        reading = asyncio.create_task(responses(stub.Generate(request("a", max_tokens=20))))
        await until(lambda: front.coordinator.pipeline.num_requests == 1)
        alone = ("grpc.use_local_subchannel_pool", 1)
        async with open_channel(front.coordinator.address, alone) as channel:
            stranger = vllm_engine_pb2_grpc.VllmEngineStub(channel)
            await stranger.Abort(pb.AbortRequest(request_ids=["a", "b"]))
            own = asyncio.create_task(responses(stranger.Generate(request("a", max_tokens=60))))
            await until(lambda: front.coordinator.pipeline.num_requests == 2)
            await stranger.Abort(pb.AbortRequest(request_ids=["a"]))
            *_, last = await asyncio.wait_for(own, 5)
            assert last.complete.finish_reason == "abort"
        *_, last = await asyncio.wait_for(reading, 10)
        assert last.complete.finish_reason == "length"
        sample = front.coordinator.registry.get_sample_value
        assert sample("diptych_aborts_refused_total", {"model_name": "smollm2"}) == 2


async def test_a_client_that_goes_takes_its_request_along():
    async with engine() as (front, stub):
        worker = await front.worker(pace_s=0.05)
        call = stub.Generate(request(max_tokens=60))
        await call.read()
        call.cancel()
        await asyncio.wait_for(worker.cancelled.wait(), 5)
        await until(lambda: front.coordinator.pipeline.num_requests == 0)


async def test_health_and_what_is_known_of_model_and_server():
    async with engine(max_model_len=512) as (front, stub):
        assert not (await stub.HealthCheck(pb.HealthCheckRequest())).healthy
        await front.worker()
        assert (await stub.HealthCheck(pb.HealthCheckRequest())).healthy
        model = await stub.GetModelInfo(pb.GetModelInfoRequest())
        assert (model.served_model_name, model.max_context_length) == ("smollm2", 512)
        assert model.is_generation
        assert not model.supports_vision
        assert list(model.eos_token_ids) == list(front.coordinator.model.limits.eos_token_ids)
        assert list(model.architectures) == ["LlamaForCausalLM"]
        before = await stub.GetServerInfo(pb.GetServerInfoRequest())
        assert (before.active_requests, before.last_receive_timestamp) == (0, 0.0)
        assert before.block_size == 16
        await responses(stub.Generate(request(), timeout=10))
        after = await stub.GetServerInfo(pb.GetServerInfoRequest())
        assert after.last_receive_timestamp > 0
        assert after.uptime_seconds > before.uptime_seconds
        front.coordinator.pipeline.draining = True
        assert (await stub.GetServerInfo(pb.GetServerInfoRequest())).is_paused
        assert not (await stub.HealthCheck(pb.HealthCheckRequest())).healthy


async def test_refusals_are_statuses():
    async with engine() as (front, stub):
        await front.worker()
        for made, code in (
            (request(temperature=-1.0), grpc.StatusCode.INVALID_ARGUMENT),
            (pb.GenerateRequest(text="x", media_refs={}), grpc.StatusCode.UNIMPLEMENTED),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await responses(stub.Generate(made, timeout=10))
            assert caught.value.code() is code
