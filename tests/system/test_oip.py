"""Foreign protocols against a real stack: the answers are those of Generate."""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any

import grpc
import pytest

from engine.pb.inference import grpc_service_pb2 as oip
from engine.pb.inference import grpc_service_pb2_grpc as oip_grpc
from engine.pb.vllm import vllm_engine_pb2 as vllm
from engine.pb.vllm import vllm_engine_pb2_grpc as vllm_grpc
from engine.rpc.channel import open_channel
from tests.ecosystem.health_probe import probe
from tests.ecosystem.reflection import walk
from tests.support.stack import Stack, metrics_of, until

PROMPT = list(range(2000, 2070))
MAX_TOKENS = 24
pytestmark = pytest.mark.timeout(300)


def infer_request(request_id: str, streaming: bool, **options: Any) -> oip.ModelInferRequest:
    """Token ids as raw bytes, options as vLLM's backend takes them."""
    packed = json.dumps({"max_tokens": MAX_TOKENS, **options}).encode()
    made = oip.ModelInferRequest(model_name="smollm2", id=request_id)
    for name, datatype, shape, raw in (
        ("input_ids", "INT32", [len(PROMPT)], struct.pack(f"<{len(PROMPT)}i", *PROMPT)),
        ("streaming", "BOOL", [1], bytes([streaming])),
        ("sampling_parameters", "BYTES", [1], struct.pack("<I", len(packed)) + packed),
    ):
        made.inputs.add(name=name, datatype=datatype, shape=shape)
        made.raw_input_contents.append(raw)
    made.outputs.add(name="output_ids")
    return made


def token_ids(response: oip.ModelInferResponse) -> list[int]:
    (raw,) = response.raw_output_contents
    return list(struct.unpack(f"<{len(raw) // 4}i", raw))


@pytest.fixture
def stack(quick_stack: Stack) -> Stack:
    return quick_stack


async def test_streams_and_whole_answers_are_those_of_generate(stack: Stack) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"temperature": 0.75, "seed": 11, "top_p": 0.875},
        {"temperature": 1.25, "seed": 12, "top_k": 40, "repetition_penalty": 1.125},
        {"ignore_eos": True, "logit_bias": {"198": -100}},
    ]
    expected = []
    for each in options:
        own = {**each, "max_tokens": MAX_TOKENS}
        if bias := own.pop("logit_bias", None):
            own["logit_bias"] = {int(token): value for token, value in bias.items()}
        expected.append(stack.generate(PROMPT, **own)[0])
    async with open_channel(stack.address) as channel:
        stub = oip_grpc.GRPCInferenceServiceStub(channel)
        for each, ids in zip(options, expected, strict=True):
            whole = await stub.ModelInfer(infer_request("whole", False, **each), timeout=60)
            assert token_ids(whole) == ids
        call = stub.ModelStreamInfer(timeout=60)
        for i, each in enumerate(options):
            await call.write(infer_request(str(i), True, **each))
        await call.done_writing()
        got: dict[str, list[int]] = {str(i): [] for i in range(len(options))}
        async for response in call:
            assert not response.error_message
            got[response.infer_response.id] += token_ids(response.infer_response)
        assert list(got.values()) == expected
        engine = vllm_grpc.VllmEngineStub(channel)
        request = vllm.GenerateRequest(
            tokenized=vllm.TokenizedInput(input_ids=PROMPT),
            sampling_params=vllm.SamplingParams(temperature=0, max_tokens=MAX_TOKENS),
        )
        (last,) = [response async for response in engine.Generate(request, timeout=60)]
        assert list(last.complete.output_ids) == expected[0]


async def test_a_cancelled_stream_frees_the_workers(stack: Stack) -> None:
    async with open_channel(stack.address) as channel:
        call = oip_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(timeout=60)
        for i in range(4):
            request = infer_request(str(i), True, max_tokens=1500, ignore_eos=True)
            await call.write(request)
        await call.read()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            while await call.read() is not grpc.aio.EOF:
                pass
    until(
        lambda: metrics_of(stack.http_address)["diptych_num_requests_running"] == 0,
        5,
        "no request runs",
    )
    stack.assert_at_rest(5)


def test_reflection_and_health(stack: Stack) -> None:
    assert "5 called" in walk(stack.address, "smollm2")
    assert "inference.GRPCInferenceService" in probe(stack.address)
