"""What an operator switches off is off in every protocol."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from coordinator.api.grpc.requests import read_request
from coordinator.api.switches import _PARTS, Switches
from engine.base import options as config
from engine.base.errors import ConfigError, NotOffered
from engine.base.option_groups import FrontOptions
from engine.base.option_values import DISABLABLE
from engine.pb.diptych.v1 import inference_pb2 as pb
from engine.pb.inference import grpc_service_pb2, grpc_service_pb2_grpc
from engine.pb.vllm import vllm_engine_pb2, vllm_engine_pb2_grpc
from engine.rpc.channel import open_channel
from engine.rpc.status import from_rpc_error
from tests.support.http_front import http_front

Code = grpc.StatusCode
PROTOCOLS = ("engine-protocol", "oip", "openai", "reflection")
USES = {
    "constraints": ("constraint.regex", {"constraint": pb.Constraint(regex="a+")}),
    "echo": ("output.echo", {"output": pb.Output(echo=True)}),
    "logit-bias": ("sampling.logit_bias", {"sampling": pb.Sampling(logit_bias={1: 1.0})}),
    "logprobs": ("output.logprobs", {"output": pb.Output(logprobs=0)}),
    "n": ("n", {"n": 2}),
    "priority": ("priority", {"priority": -1}),
    "prompt-logprobs": ("output.prompt_logprobs", {"output": pb.Output(prompt_logprobs=0)}),
    "resume": ("resume", {"resume": [pb.Resume(token_ids=[5])]}),
}
CHAT = [pb.Message(role="user", content="Hi")]
TOOL = '[{"type": "function", "function": {"name": "f"}}]'


def parsed(*argv):
    parser = config.parser("x", "x")
    config.add_flags(parser, FrontOptions)
    (front,) = config.resolve(parser.parse_args(argv), FrontOptions, environ={})
    return front.disable


def test_names_are_parts_and_protocols():
    assert sorted(DISABLABLE) == sorted((*_PARTS, *PROTOCOLS))
    assert {*USES, "tools"} == set(_PARTS)


def test_the_flag_is_a_list_and_may_stand_twice(tmp_path):
    assert parsed() == ""
    assert parsed("--disable", "resume, n") == "n,resume"
    assert parsed("--disable", "n", "--disable=tools,n") == "n,tools"
    file = tmp_path / "x.toml"
    file.write_text('disable = ["oip", "n"]')
    assert parsed("--config", str(file)) == "n,oip"
    for bad in ("nn", "n,N", "constraint"):
        with pytest.raises(ConfigError, match=r"--disable: '.*' is unknown; expected one of const"):
            parsed("--disable", bad)


@pytest.mark.parametrize("name", USES)
def test_each_part_alone(name):
    field, fields = USES[name]
    request = read_request(pb.GenerateRequest(text="x", **fields))
    Switches(",".join(set(_PARTS) - {name, "logprobs"})).check(request)
    with pytest.raises(NotOffered, match=rf"^{field} is switched off .*--disable {name}") as caught:
        Switches(name).check(request)
    assert caught.value.field == field


def test_defaults_given_by_name_are_no_use():
    request = pb.ChatRequest(messages=CHAT, n=1, priority=0, output=pb.Output(echo=False))
    Switches(",".join(_PARTS)).check(read_request(request))
    with pytest.raises(NotOffered, match=r"^output.prompt_logprobs"):
        request = pb.GenerateRequest(output=pb.Output(prompt_logprobs=1))
        Switches("logprobs").check(read_request(request))


async def status(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [m async for m in call] if hasattr(call, "__aiter__") else await call
    return caught.value


async def test_every_protocol_refuses_the_part_and_serves_the_rest():
    async with http_front(disable="n,logprobs,constraints,tools,priority") as front:
        await front.worker()
        refused = [
            (front.stub.Generate(pb.GenerateRequest(text="x", n=2)), "n"),
            (front.stub.Chat(pb.ChatRequest(messages=CHAT, tools_json=TOOL)), "tools_json"),
            (
                front.stub.Tokenize(
                    pb.TokenizeRequest(chat=pb.ChatMessages(messages=CHAT, tools_json=TOOL))
                ),
                "chat.tools_json",
            ),
        ]
        for call, field in refused:
            error = await status(call)
            assert error.code() is Code.UNIMPLEMENTED
            meaning = from_rpc_error(error)
            assert isinstance(meaning, NotOffered)
            assert meaning.field == field
            assert "switched off" in meaning.message
        assert (await front.stub.GetModel(pb.GetModelRequest())).disabled == [
            *("constraints", "logprobs", "n", "priority", "tools")
        ]

        for body, param in (
            ({"n": 2}, "n"),
            ({"logprobs": 1}, "logprobs"),
            ({"priority": 3}, "priority"),
            ({"response_format": {"type": "json_object"}}, "response_format"),
        ):
            answer = await front.complete(**body)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (400, "unsupported_parameter"), body
            assert error["param"].startswith(param) and "switched off" in error["message"]
        assert (await front.complete()).status_code == 200

        async with open_channel(front.coordinator.address) as channel:
            engine = vllm_engine_pb2_grpc.VllmEngineStub(channel)
            request = vllm_engine_pb2.GenerateRequest(
                request_id="r", text="x", sampling_params=vllm_engine_pb2.SamplingParams(n=2)
            )
            error = await status(engine.Generate(request))
            assert (error.code(), "switched off" in error.details()) == (Code.UNIMPLEMENTED, True)
            oip = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
            infer = grpc_service_pb2.ModelInferRequest(model_name="smollm2")
            infer.parameters["n"].int64_param = 2
            tensor = infer.inputs.add(name="text_input", datatype="BYTES", shape=[1])
            tensor.contents.bytes_contents.append(b"x")
            error = await status(oip.ModelInfer(infer))
            assert (error.code(), "switched off" in error.details()) == (Code.UNIMPLEMENTED, True)


async def test_protocols_are_not_there():
    async with http_front(disable=",".join(PROTOCOLS)) as front:
        await front.worker()
        for path in ("/v1/models", "/v1/completions", "/tokenize", "/openapi.json", "/docs"):
            assert (await front.http.get(path)).status_code == 404
        assert (await front.http.get("/health")).status_code == 200
        async with open_channel(front.coordinator.address) as channel:
            engine = vllm_engine_pb2_grpc.VllmEngineStub(channel)
            abort = engine.Abort(vllm_engine_pb2.AbortRequest())
            oip = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
            live = oip.ServerLive(grpc_service_pb2.ServerLiveRequest())
            reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
            listing = reflection.ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            )
            for call in (abort, live, listing):
                assert (await status(call)).code() is Code.UNIMPLEMENTED
            health = health_pb2_grpc.HealthStub(channel)
            await health.Check(health_pb2.HealthCheckRequest())
            for name in ("vllm.grpc.engine.VllmEngine", "inference.GRPCInferenceService"):
                check = health.Check(health_pb2.HealthCheckRequest(service=name))
                assert (await status(check)).code() is Code.NOT_FOUND
        assert [m async for m in front.stub.Generate(pb.GenerateRequest(text="x"))]


async def test_nothing_is_off_by_default():
    async with http_front() as front:
        assert not (await front.stub.GetModel(pb.GetModelRequest())).disabled
        assert (await front.http.get("/v1/models")).status_code == 200
