"""Server reflection, in both versions of its protocol: what grpcurl and the like ask first.

The library serves grpc.reflection.v1alpha. Version v1 has the same messages under another package
name, so the library's servicer answers both; v1's descriptors are made of v1alpha's, so that the
service can be described like any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2

_ALPHA, _STABLE = "grpc.reflection.v1alpha", "grpc.reflection.v1"
_STABLE_SERVICE = f"{_STABLE}.ServerReflection"


def enable_reflection(names: Sequence[str], server: grpc.aio.Server) -> None:
    """Let callers list `names` and the reflection services, and describe all that they use."""
    _register_descriptors()
    names = (*names, reflection.SERVICE_NAME, _STABLE_SERVICE)
    reflection.enable_server_reflection(names, server)
    servicer = reflection.aio.ReflectionServicer(names)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers = {"ServerReflectionInfo": handler}
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(_STABLE_SERVICE, handlers),)
    )


def _register_descriptors() -> None:
    """Put v1's file into the pool that reflection answers from, once a process."""
    pool = descriptor_pool.Default()
    try:
        pool.FindServiceByName(_STABLE_SERVICE)
        return
    except KeyError:
        pass
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    file.name = "grpc/reflection/v1/reflection.proto"
    file.package = _STABLE
    for message in file.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = _stable(field.type_name)
    for method in file.service[0].method:
        method.input_type = _stable(method.input_type)
        method.output_type = _stable(method.output_type)
    pool.AddSerializedFile(file.SerializeToString())


def _stable(name: str) -> str:
    return name.replace(f".{_ALPHA}.", f".{_STABLE}.")
