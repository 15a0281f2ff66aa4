"""Server reflection, in both versions of its protocol: what grpcurl and the like ask first.

The library serves grpc.reflection.v1alpha. Version v1 has the same messages under another package
name, so the library's servicer answers both; v1's descriptors are made of v1alpha's, so that the
service can be described like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2

_ALPHA, _STABLE = "grpc.reflection.v1alpha", "grpc.reflection.v1"
_STABLE_SERVICE = f"{_STABLE}.ServerReflection"


def enable_reflection(names: Sequence[str], server: grpc.aio.Server) -> None:
    """Let callers list `names` and the reflection services, and describe all that they use."""
    _register_descriptors()
    servicer = _Servicer((*names, reflection.SERVICE_NAME, _STABLE_SERVICE))
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers = {"ServerReflectionInfo": handler}
    for service in (reflection.SERVICE_NAME, _STABLE_SERVICE):
        generic = grpc.method_handlers_generic_handler(service, handlers)
        server.add_generic_rpc_handlers((generic,))


class _Servicer(reflection.aio.ReflectionServicer):
    """The library's, which does not know symbols within services and messages."""

    def _file_containing_symbol(self, request: Any, fully_qualified_name: str) -> Any:
        """A method or a field is where its service or message is."""
        response = super()._file_containing_symbol(request, fully_qualified_name)
        outer = fully_qualified_name.rpartition(".")[0]
        if response.HasField("error_response") and _is_declared(outer):
            response = super()._file_containing_symbol(request, outer)
        return response


def _is_declared(name: str) -> bool:
    """Whether `name` is a service or a message, and not a package."""
    pool = descriptor_pool.Default()
    for find in (pool.FindServiceByName, pool.FindMessageTypeByName):
        try:
            find(name)
            return True
        except KeyError:
            pass
    return False


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
