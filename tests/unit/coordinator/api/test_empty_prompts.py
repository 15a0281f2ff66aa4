"""The empty prompt: a prompt where the tokenizer begins a text with a token, else refused."""

from __future__ import annotations

import grpc
import pytest

from engine.pb.diptych.v1 import inference_pb2 as pb
from engine.pb.inference import grpc_service_pb2 as oip_pb
from engine.pb.inference import grpc_service_pb2_grpc
from engine.pb.vllm import vllm_engine_pb2, vllm_engine_pb2_grpc
from engine.rpc.channel import open_channel
from tests.support.http_front import http_front
from tests.support.tiny_tokenizer import tiny_tokenizer

BOS = 1


def oip_request(name: str = "text_input") -> oip_pb.ModelInferRequest:
    request = oip_pb.ModelInferRequest(model_name="smollm2")
    if name == "text_input":
        tensor = request.inputs.add(name=name, datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(b"")
    else:
        request.inputs.add(name=name, datatype="INT32", shape=[0])
    request.parameters["max_tokens"].int64_param = 3
    return request


def vllm_request(**prompt) -> vllm_engine_pb2.GenerateRequest:
    return vllm_engine_pb2.GenerateRequest(
        request_id="r", sampling_params=vllm_engine_pb2.SamplingParams(max_tokens=3), **prompt
    )


async def test_an_empty_text_is_the_models_first_token_over_each_protocol():
    async with http_front(own=tiny_tokenizer("llama2")) as f:
        worker = await f.worker("the worker reads the")
        expected = await f.grpc_tokens(text="", stop=pb.Stop(max_tokens=3))
        assert expected == worker.answer[:3]
        for body in ({"prompt": ""}, {"prompt": ["", "the"]}, {"prompt": "", "stream": True}):
            got = await f.complete(max_tokens=3, **body)
            assert got.status_code == 200, got.text
        echoed = await f.complete(prompt="", max_tokens=3, echo=True, logprobs=None)
        assert echoed.json()["choices"][0]["text"]
        async with open_channel(f.coordinator.address) as channel:
            oip = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
            answer = await oip.ModelInfer(oip_request(), timeout=10)
            assert answer.outputs[0].contents.bytes_contents[0]
            engine = vllm_engine_pb2_grpc.VllmEngineStub(channel)
            assert [r async for r in engine.Generate(vllm_request(text=""), timeout=10)]
        prompts = [list(r.prompt_token_ids) for r in worker.requests]
        assert prompts.count([BOS]) == len(prompts) - 1  # all but "the"


async def test_an_empty_text_without_a_first_token_is_refused_by_name():
    async with http_front() as f:
        await f.worker()
        for body, param in [
            ({"prompt": ""}, "prompt"),
            ({"prompt": ["x", ""]}, "prompt[1]"),
            ({"prompt": "", "stream": True}, "prompt"),
            ({"prompt": []}, "prompt"),
            ({"prompt": [[]]}, "prompt"),
            ({"prompt": ["x", []]}, "prompt[1]"),
        ]:
            got = await f.complete(max_tokens=3, **body)
            assert (got.status_code, got.json()["error"]["param"]) == (400, param), body
            assert "expected" in got.json()["error"]["message"]
        async with open_channel(f.coordinator.address) as channel:
            oip = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
            engine = vllm_engine_pb2_grpc.VllmEngineStub(channel)
            tokenized = vllm_engine_pb2.TokenizedInput(input_ids=[])
            for call in (
                oip.ModelInfer(oip_request(), timeout=10),
                oip.ModelInfer(oip_request("input_ids"), timeout=10),
                _first(engine.Generate(vllm_request(text=""), timeout=10)),
                _first(engine.Generate(vllm_request(tokenized=tokenized), timeout=10)),
                _first(f.stub.Generate(pb.GenerateRequest(text=""), timeout=10)),
                _first(f.stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds()), timeout=10)),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert "expected" in caught.value.details()


async def _first(call):
    return await call.read()
