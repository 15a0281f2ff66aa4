"""Reflection in both versions: services, files, and symbols within them."""

from contextlib import asynccontextmanager

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2

from engine.pb.inference import grpc_service_pb2
from engine.rpc.channel import open_channel
from engine.rpc.server import RpcServer

VERSIONS = ("grpc.reflection.v1", "grpc.reflection.v1alpha")


class Nothing:
    """A servicer whose methods are never called."""

    def __getattr__(self, name):
        return None


@asynccontextmanager
async def reflecting(version):
    server = RpcServer()
    service = grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    server.add_service(service, Nothing())
    port = server.listen("127.0.0.1:0")
    await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        method = channel.stream_stream(
            f"/{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )

        async def ask(**fields):
            call = method(iter([reflection_pb2.ServerReflectionRequest(**fields)]), timeout=10)
            return await call.read()

        yield ask
    await server.stop()


def files(response):
    raw = response.file_descriptor_response.file_descriptor_proto
    return {f.name for f in map(descriptor_pb2.FileDescriptorProto.FromString, raw)}


@pytest.mark.parametrize("version", VERSIONS)
async def test_services_and_what_they_import(version):
    async with reflecting(version) as ask:
        listed = (await ask(list_services="")).list_services_response.service
        names = {service.name for service in listed}
        assert names == {
            "inference.GRPCInferenceService",
            "grpc.health.v1.Health",
            *(f"{each}.ServerReflection" for each in VERSIONS),
        }
        for name in names:
            assert files(await ask(file_containing_symbol=name)), name
        found = files(await ask(file_containing_symbol="inference.GRPCInferenceService"))
        assert found == {"inference/grpc_service.proto", "inference/model_config.proto"}


@pytest.mark.parametrize(
    "symbol",
    [
        "inference.GRPCInferenceService.ModelInfer",
        "inference.ModelInferRequest.InferInputTensor",
        "inference.ModelInferRequest.raw_input_contents",
    ],
)
@pytest.mark.parametrize("version", VERSIONS)
async def test_symbols_within_services_and_messages(version, symbol):
    async with reflecting(version) as ask:
        assert "inference/grpc_service.proto" in files(await ask(file_containing_symbol=symbol))


@pytest.mark.parametrize("symbol", ["no.such.Service", "inference.nothing", "x", ""])
@pytest.mark.parametrize("version", VERSIONS)
async def test_unknown_symbols_are_not_found(version, symbol):
    async with reflecting(version) as ask:
        response = await ask(file_containing_symbol=symbol)
        assert response.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
