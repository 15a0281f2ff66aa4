"""What grpcurl does: learn everything of a server from its reflection, then call it.

Nothing of the project's own stubs is used: descriptors come over the wire, messages are dynamic.
Both versions of the protocol are walked.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha import reflection_pb2

from tests.ecosystem.client import Client, Target
from tests.ecosystem.environments import Environment
from tests.ecosystem.runner import main

VERSIONS = ("grpc.reflection.v1", "grpc.reflection.v1alpha")
EXPECTED = {
    "diptych.v1.InferenceService",
    "diptych.v1.AdminService",
    "inference.GRPCInferenceService",
    "vllm.grpc.engine.VllmEngine",
    "grpc.health.v1.Health",
    *(f"{version}.ServerReflection" for version in VERSIONS),
}
TIMEOUT_S = 60.0


@dataclass
class Walker:
    """One server, seen through one version of reflection."""

    channel: grpc.Channel
    version: str
    pool: descriptor_pool.DescriptorPool = field(default_factory=descriptor_pool.DescriptorPool)
    files: set[str] = field(default_factory=set)

    def ask(self, **request: Any) -> reflection_pb2.ServerReflectionResponse:
        call = self.channel.stream_stream(
            f"/{self.version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        requests = iter([reflection_pb2.ServerReflectionRequest(**request)])
        (response,) = call(requests, timeout=TIMEOUT_S)
        return response

    def services(self) -> set[str]:
        response = self.ask(list_services="")
        return {service.name for service in response.list_services_response.service}

    def describe(self, symbol: str) -> None:
        """Take the files that declare `symbol` and what they import, and link them."""
        response = self.ask(file_containing_symbol=symbol)
        assert response.HasField("file_descriptor_response"), (symbol, response.error_response)
        raw = response.file_descriptor_response.file_descriptor_proto
        found = {f.name: f for f in map(descriptor_pb2.FileDescriptorProto.FromString, raw)}

        def add(name: str) -> None:
            if name in self.files:
                return
            if name not in found:
                answer = self.ask(file_by_filename=name).file_descriptor_response
                (missing,) = answer.file_descriptor_proto
                found[name] = descriptor_pb2.FileDescriptorProto.FromString(missing)
            for dependency in found[name].dependency:
                add(dependency)
            self.files.add(name)
            self.pool.Add(found[name])

        for name in list(found):
            add(name)

    def call(self, method: str, *requests: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """`package.Service/Method` with JSON in and JSON out."""
        service, name = method.split("/")
        found = self.pool.FindServiceByName(service).methods_by_name[name]
        request_class = message_factory.GetMessageClass(found.input_type)
        response_class = message_factory.GetMessageClass(found.output_type)
        messages = [json_format.ParseDict(request, request_class()) for request in requests]
        streaming = (found.client_streaming, found.server_streaming)
        kind = "_".join("stream" if each else "unary" for each in streaming)
        call = getattr(self.channel, kind)(
            f"/{method}",
            request_serializer=request_class.SerializeToString,
            response_deserializer=response_class.FromString,
        )
        argument = iter(messages) if found.client_streaming else messages[0]
        answer = call(argument, timeout=TIMEOUT_S)
        for response in answer if found.server_streaming else [answer]:
            yield json_format.MessageToDict(response, preserving_proto_field_name=True)


def walk(address: str, model: str) -> str:
    """List, describe and call; returns what was seen."""
    described = 0
    for version in VERSIONS:
        with grpc.insecure_channel(address) as channel:
            walker = Walker(channel, version)
            names = walker.services()
            assert names >= EXPECTED, EXPECTED - names
            for name in sorted(names):
                walker.describe(name)
                methods = walker.pool.FindServiceByName(name).methods
                assert methods, name
                described += len(methods)
            walker.describe("inference.GRPCInferenceService.ModelInfer")  # a method by its name
            for name in ("no.such.Service", "inference.GRPCInferenceService.no.such"):
                unknown = walker.ask(file_containing_symbol=name)
                assert unknown.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
            _call(walker, model)
    return f"v1 and v1alpha: {len(names)} services, {described // 2} methods described, 5 called"


def _call(walker: Walker, model: str) -> None:
    (found,) = walker.call("diptych.v1.InferenceService/GetModel", {})
    assert found["name"] == model and found["ready"] is True
    request = {"text": "Once upon a time", "stop": {"max_tokens": 8}}
    *deltas, last = walker.call("diptych.v1.InferenceService/Generate", request)
    text = "".join(each["delta"].get("text", "") for each in deltas)
    assert last["finished"]["usage"]["completion_tokens"] == 8, last
    infer = {
        "model_name": model,
        "id": "walk",
        "inputs": [
            {
                "name": "text_input",
                "datatype": "BYTES",
                "shape": [1],
                "contents": {"bytes_contents": ["T25jZSB1cG9uIGEgdGltZQ=="]},
            }
        ],
        "parameters": {"max_tokens": {"int64_param": 8}},
    }
    (whole,) = walker.call("inference.GRPCInferenceService/ModelInfer", infer)
    (streamed,) = walker.call("inference.GRPCInferenceService/ModelStreamInfer", infer)
    assert streamed["infer_response"]["outputs"] == whole["outputs"]
    (encoded,) = whole["outputs"][0]["contents"]["bytes_contents"]
    assert base64.b64decode(encoded).decode() == text
    (health,) = walker.call("vllm.grpc.engine.VllmEngine/HealthCheck", {})
    assert health["healthy"] is True


def check(target: Target, environment: Environment) -> str:
    return walk(target.grpc, target.model)


CLIENT = Client("reflection", "grpcio", check)

if __name__ == "__main__":
    sys.exit(main(only=[CLIENT.name]))
