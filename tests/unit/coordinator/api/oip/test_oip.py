"""The Open Inference Protocol over the wire: real gRPC, decode workers that fail on cue."""

import asyncio
import struct
import time
from contextlib import asynccontextmanager

import grpc
import pytest

from engine.base.errors import Unavailable
from engine.pb.diptych.v1 import inference_pb2
from engine.pb.inference import grpc_service_pb2 as pb
from engine.pb.inference import grpc_service_pb2_grpc
from engine.rpc.channel import open_channel
from tests.support.fake_decode import Cue, lost
from tests.support.http_front import http_front, until

MODEL = "smollm2"
PROMPT = list(range(1000, 1040))


@asynccontextmanager
async def oip(**options):
    async with http_front(**options) as front:
        channel = open_channel(front.coordinator.address)
        try:
            yield front, grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        finally:
            await channel.close()


def request(request_id="", *, raw=True, model=MODEL, streaming=None, ids=PROMPT, **parameters):
    made = pb.ModelInferRequest(model_name=model, id=request_id)
    made.inputs.add(name="input_ids", datatype="INT32", shape=[len(ids)])
    if streaming is not None:
        made.inputs.add(name="streaming", datatype="BOOL", shape=[1])
    if raw:
        made.raw_input_contents.append(struct.pack(f"<{len(ids)}i", *ids))
        if streaming is not None:
            made.raw_input_contents.append(bytes([streaming]))
    else:
        made.inputs[0].contents.int_contents.extend(ids)
        if streaming is not None:
            made.inputs[1].contents.bool_contents.append(streaming)
    for name, value in parameters.items():
        match value:
            case bool():
                made.parameters[name].bool_param = value
            case int():
                made.parameters[name].int64_param = value
            case str():
                made.parameters[name].string_param = value
    return made


def outputs(response):
    """Tensor name -> elements, of a response in raw or in typed contents."""
    found = {}
    for i, tensor in enumerate(response.outputs):
        if not response.raw_output_contents:
            ((_, values),) = tensor.contents.ListFields()
            found[tensor.name] = list(values)
            continue
        raw = response.raw_output_contents[i]
        if tensor.datatype == "INT32":
            found[tensor.name] = list(struct.unpack(f"<{len(raw) // 4}i", raw))
        else:
            found[tensor.name] = [raw[4:]]
            assert struct.unpack("<I", raw[:4])[0] == len(raw) - 4
    return found


async def collect(call, *ids):
    """Responses by id, until each of `ids` has had its last one."""
    found = {}
    open_ids = set(ids)
    while open_ids:
        response = await asyncio.wait_for(call.read(), 10)
        assert response is not grpc.aio.EOF
        inner = response.infer_response
        found.setdefault(inner.id, []).append(response)
        if inner.parameters["triton_final_response"].bool_param:
            open_ids.remove(inner.id)
    return found


def tokens(responses):
    found = [outputs(r.infer_response).get("output_ids", []) for r in responses]
    return [i for ids in found for i in ids]


def text(responses):
    found = [outputs(r.infer_response).get("text_output", [b""]) for r in responses]
    return b"".join(piece for (piece,) in found).decode()


async def error_of(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_ready_follows_the_workers_and_live_does_not():
    async with oip() as (front, stub):
        named = pb.ModelReadyRequest(name=MODEL)
        assert (await stub.ServerLive(pb.ServerLiveRequest())).live
        assert not (await stub.ServerReady(pb.ServerReadyRequest())).ready
        assert not (await stub.ModelReady(named)).ready
        await front.worker()
        assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
        assert (await stub.ModelReady(named)).ready
        assert (await stub.ModelReady(pb.ModelReadyRequest())).ready
        for other in (pb.ModelReadyRequest(name="x"), pb.ModelReadyRequest(version="3")):
            assert not (await stub.ModelReady(other)).ready
        front.coordinator.pipeline.draining = True
        assert not (await stub.ServerReady(pb.ServerReadyRequest())).ready
        assert not (await stub.ModelReady(named)).ready
        assert (await stub.ServerLive(pb.ServerLiveRequest())).live


async def test_metadata_and_config():
    async with oip(max_model_len=512) as (_, stub):
        server = await stub.ServerMetadata(pb.ServerMetadataRequest())
        assert server.name == "diptych"
        assert "model_configuration" in server.extensions
        metadata = await stub.ModelMetadata(pb.ModelMetadataRequest(name=MODEL))
        assert (metadata.name, list(metadata.versions)) == (MODEL, ["1"])
        config = (await stub.ModelConfig(pb.ModelConfigRequest(name=MODEL))).config
        assert config.parameters["max_model_len"].string_value == "512"
        error = await error_of(stub.ModelMetadata(pb.ModelMetadataRequest(name="x")))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        error = await error_of(stub.ModelConfig(pb.ModelConfigRequest(name=MODEL, version="2")))
        assert error.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("raw", [True, False])
async def test_a_whole_answer_in_the_form_it_was_asked_in(raw):
    async with oip() as (front, stub):
        worker = await front.worker()
        response = await stub.ModelInfer(request("seven", raw=raw, max_tokens=7))
        assert (response.model_name, response.model_version, response.id) == (MODEL, "1", "seven")
        assert bool(response.raw_output_contents) == raw
        found = outputs(response)
        expected = front.tokenizer.decode(worker.answer[:7]).encode()
        assert found["text_output"] == [expected]
        assert found["finish_reason"] == [b"length"]
        assert found["output_ids"] == worker.answer[:7]
        assert not response.parameters
        asked = worker.requests[0]
        assert list(asked.prompt_token_ids) == PROMPT
        assert asked.stop.max_tokens == 7


async def test_options_reach_the_worker_and_the_stops():
    async with oip() as (front, stub):
        worker = await front.worker()
        await stub.ModelInfer(request(seed=5, temperature="0.5", max_tokens=3, top_k=4))
        sampling = worker.requests[0].sampling
        assert (sampling.seed, sampling.temperature, sampling.top_k) == (5, 0.5, 4)
        response = await stub.ModelInfer(request(stop="body knew wh"))
        found = outputs(response)
        assert found["text_output"] == [b"The river was wide and slow, and no"]
        assert found["finish_reason"] == [b"stop"]


async def test_a_stream_is_the_whole_answer_in_pieces():
    async with oip() as (front, stub):
        worker = await front.worker()
        call = stub.ModelStreamInfer(timeout=20)
        await call.write(request("a", streaming=True, max_tokens=20))
        await call.write(request("b", max_tokens=20))
        await call.write(
            request(
                "c",
                streaming=True,
                max_tokens=20,
                triton_enable_empty_final_response=True,
            )
        )
        found = await collect(call, "a", "b", "c")
        expected = front.tokenizer.decode(worker.answer[:20])
        for responses in found.values():
            assert tokens(responses) == worker.answer[:20]
            assert text(responses) == expected
        assert len(found["a"]) > 4
        assert len(found["b"]) == 1
        assert outputs(found["a"][-1].infer_response)["finish_reason"] == [b"length"]
        assert not found["c"][-1].infer_response.outputs
        assert outputs(found["c"][-2].infer_response)["finish_reason"] == [b"length"]
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK


async def test_requests_of_a_stream_are_interleaved():
    async with oip() as (front, stub):
        await front.worker(pace_s=0.01)
        call = stub.ModelStreamInfer(timeout=20)
        names = [f"r{i}" for i in range(5)]
        for name in names:
            await call.write(request(name, streaming=True, max_tokens=30))
        order = []
        ended = 0
        while ended < len(names):
            inner = (await call.read()).infer_response
            order.append(inner.id)
            ended += inner.parameters["triton_final_response"].bool_param
        first_end = max(order.index(name) for name in names)
        assert first_end < len(order) / 3, "all began long before the first ended"
        call.cancel()


async def test_an_error_is_its_requests_alone():
    async with oip() as (front, stub):
        worker = await front.worker()
        call = stub.ModelStreamInfer(timeout=20)
        bad = [
            (request("unknown", no_such=1), "no_such", "INVALID_ARGUMENT"),
            (request("model", model="x"), "'x'", "NOT_FOUND"),
            (request("behind", streaming=True, max_tokens=0), "max_tokens", "INVALID_ARGUMENT"),
            (request("empty", ids=[]), "token_ids", "INVALID_ARGUMENT"),
        ]
        for each, _, _ in bad:
            await call.write(each)
        await call.write(request("good", max_tokens=5))
        found = await collect(call, "unknown", "model", "behind", "empty", "good")
        for each, part, code in bad:
            (response,) = found[each.id]
            assert part in response.error_message
            assert response.infer_response.parameters["error_code"].string_param == code
        assert not found["good"][0].error_message
        assert tokens(found["good"]) == worker.answer[:5]
        invalid = front.sample("request_failures_total", model_name=MODEL, code="invalid_argument")
        assert invalid == 3
        call.cancel()


async def test_a_client_may_have_errors_end_the_stream():
    async with oip() as (front, stub):
        worker = await front.worker(pace_s=0.05)
        call = stub.ModelStreamInfer(timeout=20, metadata=(("triton_grpc_error", "true"),))
        await call.write(request("long", streaming=True, max_tokens=50))
        await call.read()
        await call.write(request("bad", no_such=1))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await call.read() is not grpc.aio.EOF:
                pass
            raise AssertionError(await call.code())
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "no_such" in caught.value.details()
        await asyncio.wait_for(worker.cancelled.wait(), 5)


async def test_cancelling_the_stream_ends_all_its_requests():
    async with oip() as (front, stub):
        worker = await front.worker(pace_s=0.02)
        call = stub.ModelStreamInfer(timeout=20)
        for i in range(4):
            await call.write(request(f"r{i}", streaming=True, max_tokens=60))
        await call.read()
        await until(lambda: front.coordinator.pipeline.num_requests == 4)
        call.cancel()
        await asyncio.wait_for(worker.cancelled.wait(), 5)
        await until(lambda: front.coordinator.pipeline.num_requests == 0)


async def test_cancelling_a_unary_call_goes_down_the_chain():
    async with oip() as (front, stub):
        worker = await front.worker(pace_s=0.05)
        call = stub.ModelInfer(request(max_tokens=60))
        await until(lambda: len(worker.requests) == 1)  # the worker has it
        call.cancel()
        await asyncio.wait_for(worker.cancelled.wait(), 5)
        await until(lambda: front.coordinator.pipeline.num_requests == 0)


async def test_done_writing_lets_requests_finish():
    async with oip() as (front, stub):
        worker = await front.worker(pace_s=0.01)
        call = stub.ModelStreamInfer(timeout=20)
        await call.write(request("a", max_tokens=20))
        await call.done_writing()
        responses = [response async for response in call]
        assert tokens(responses) == worker.answer[:20]


async def test_more_requests_than_one_stream_may_have_open_wait_their_turn(monkeypatch):
    monkeypatch.setattr("coordinator.api.oip.service._MAX_OPEN", 3)
    async with oip() as (front, stub):
        await front.worker(pace_s=0.02)
        call = stub.ModelStreamInfer(timeout=30)
        names = [f"r{i}" for i in range(9)]
        for name in names:
            await call.write(request(name, max_tokens=9))
        most = 0
        collecting = asyncio.create_task(collect(call, *names))
        while not collecting.done():
            most = max(most, front.coordinator.pipeline.num_requests)
            await asyncio.sleep(0.005)
        await collecting
        assert most == 3
        call.cancel()


async def test_a_requests_own_timeout():
    async with oip() as (front, stub):
        await front.worker(pace_s=0.1, group=1)
        started = time.monotonic()
        error = await error_of(stub.ModelInfer(request(max_tokens=60, timeout=300_000)))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert 0.2 < time.monotonic() - started < 3
        call = stub.ModelStreamInfer(timeout=20)
        await call.write(request("late", streaming=True, max_tokens=60, timeout=300_000))
        responses = (await collect(call, "late"))["late"]
        assert responses[-1].error_message
        parameters = responses[-1].infer_response.parameters
        assert parameters["error_code"].string_param == "DEADLINE_EXCEEDED"
        call.cancel()


async def test_an_idle_stream_outlives_a_requests_limit():
    async with oip(max_request_s=0.3) as (front, stub):
        worker = await front.worker()
        call = stub.ModelStreamInfer()
        await call.write(request("a", max_tokens=5))
        await collect(call, "a")
        await asyncio.sleep(0.6)
        await call.write(request("b", max_tokens=5))
        assert tokens((await collect(call, "b"))["b"]) == worker.answer[:5]
        call.cancel()


async def test_a_stream_is_idle_only_while_no_request_of_it_runs():
    """The limit starts again after an output, since the server caused that wait."""
    async with oip(client_timeout_s=0.2) as (front, stub):  # idle: 2 s
        worker = await front.worker(pace_s=0.4)
        call = stub.ModelStreamInfer()
        for name in ("a", "b"):
            await call.write(request(name, max_tokens=18))  # 2.4 s
            assert tokens((await collect(call, name))[name]) == worker.answer[:18]
            await asyncio.sleep(0.5)
        error = await error_of(asyncio.wait_for(call.read(), 20))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "no message within 2 s" in error.details()
        assert front.coordinator.pipeline.num_requests == 0
        never = stub.ModelStreamInfer()
        error = await error_of(asyncio.wait_for(never.read(), 20))
        assert "no message within 0.2 s" in error.details()


async def test_overload_says_when_to_come_back():
    async with oip(max_queued_requests=1) as (front, stub):
        await front.worker(pace_s=0.1)
        call = stub.ModelStreamInfer(timeout=20)
        await call.write(request("first", streaming=True, max_tokens=30))
        await call.read()
        await call.write(request("second", max_tokens=5))
        response = (await collect(call, "second"))["second"][0]
        parameters = response.infer_response.parameters
        assert parameters["error_code"].string_param == "RESOURCE_EXHAUSTED"
        assert parameters["retry_after_s"].double_param > 0
        error = await error_of(stub.ModelInfer(request(max_tokens=5)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        call.cancel()


async def test_a_lost_worker_is_no_seam_in_a_stream():
    async with oip() as (front, stub):
        first = await front.worker(name="d0", cues=[Cue(7, lost())])
        await front.worker(name="d1")
        call = stub.ModelStreamInfer(timeout=20)
        await call.write(request("a", streaming=True, max_tokens=30))
        responses = (await collect(call, "a"))["a"]
        assert tokens(responses) == first.answer[:30]
        assert text(responses) == front.tokenizer.decode(first.answer[:30])
        call.cancel()


async def test_nobody_to_serve_is_unavailable():
    async with oip(worker_wait_s=0.1) as (_, stub):
        error = await error_of(stub.ModelInfer(request(max_tokens=5)))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        call = stub.ModelStreamInfer(timeout=20)
        await call.write(request("a", max_tokens=5))
        response = (await collect(call, "a"))["a"][0]
        parameters = response.infer_response.parameters
        assert parameters["error_code"].string_param == "UNAVAILABLE"
        assert parameters["retry_after_s"].double_param >= Unavailable("").retry_after_s
        call.cancel()


async def test_streaming_on_a_unary_call_is_refused():
    async with oip() as (front, stub):
        await front.worker()
        error = await error_of(stub.ModelInfer(request(streaming=True)))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "ModelStreamInfer" in error.details()


async def test_a_bug_is_internal_and_its_requests_alone(monkeypatch):
    async with oip() as (front, stub):
        worker = await front.worker()

        def broken(*_args):
            raise RuntimeError("a bug")

        call = stub.ModelStreamInfer(timeout=20)
        with monkeypatch.context() as patched:
            patched.setattr("coordinator.api.oip.service.read_request", broken)
            await call.write(request("a"))
            response = (await collect(call, "a"))["a"][0]
        assert "internal error" in response.error_message
        assert "a bug" not in response.error_message
        assert response.infer_response.parameters["error_code"].string_param == "INTERNAL"
        await call.write(request("b", max_tokens=5))
        assert tokens((await collect(call, "b"))["b"]) == worker.answer[:5]
        call.cancel()


async def test_malformed_bytes_are_the_callers_error():
    async with http_front() as front, open_channel(front.coordinator.address) as channel:
        call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(
            iter([b"\xff\xff\xff"]), timeout=10
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_answer_is_that_of_generate():
    async with oip() as (front, stub):
        await front.worker()
        ids = inference_pb2.TokenIds(ids=PROMPT)
        expected = await front.grpc_tokens(token_ids=ids)
        assert outputs(await stub.ModelInfer(request()))["output_ids"] == expected
