"""Server reflection for grpcurl and similar tools, in both versions of the protocol.

grpcio-reflection serves grpc.reflection.v1alpha. Version v1 has the same messages in another
package, so the same servicer serves both; the descriptors of v1 are derived from v1alpha's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_reflection.v1alpha import reflection, reflection_pb2

_ALPHA, _STABLE = "grpc.reflection.v1alpha", "grpc.reflection.v1"
_ALPHA_SERVICE, _STABLE_SERVICE = f"{_ALPHA}.ServerReflection", f"{_STABLE}.ServerReflection"


DESCRIPTOR: Any = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]
SERVICES = (_ALPHA_SERVICE, _STABLE_SERVICE)


def reflection_servicer(names: Sequence[str]) -> Any:
    """A servicer that lists and describes the services `names` and reflection."""
    _register_descriptors()
    return _Servicer((*names, *SERVICES))


class _Servicer(reflection.aio.ReflectionServicer):
    """Adds methods and fields, which grpcio-reflection does not find."""

    def _file_containing_symbol(self, request: Any, fully_qualified_name: str) -> Any:
        find: Any = super()._file_containing_symbol  # type: ignore[misc]
        response = find(request, fully_qualified_name)
        outer = fully_qualified_name.rpartition(".")[0]
        if response.HasField("error_response") and _is_declared(outer):
            response = find(request, outer)
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
    """Add the file of v1 to the default descriptor pool, once a process."""
    pool = descriptor_pool.Default()
    try:
        pool.FindServiceByName(_STABLE_SERVICE)
        return
    except KeyError:
        pass
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    file.name = "grpc/reflection/v1/reflection.proto"
    text = text_format.MessageToString(file).replace(_ALPHA, _STABLE)
    stable = text_format.Parse(text, descriptor_pb2.FileDescriptorProto())
    pool.AddSerializedFile(stable.SerializeToString())
