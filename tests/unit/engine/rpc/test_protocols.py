"""Foreign protocols have the names, numbers and types of their publishers."""

import json

import pytest
from google.protobuf import descriptor_pb2

from engine.pb.inference import grpc_service_pb2, model_config_pb2
from engine.pb.vllm import vllm_engine_pb2
from tests.support.paths import DATA

FACTS = json.loads((DATA / "protocol_fields.json").read_text())
FIELD = descriptor_pb2.FieldDescriptorProto
FILES = (grpc_service_pb2, model_config_pb2, vllm_engine_pb2)


def messages(prefix, found):
    for message in found:
        yield prefix + message.name, message
        yield from messages(f"{prefix}{message.name}.", message.nested_type)


def shape(field, message):
    """The form of the data: number, label, type and oneof of a field."""
    count = "optional" if field.proto3_optional else "single"
    if field.label == FIELD.LABEL_REPEATED:
        count = "repeated"
    scalar = FIELD.Type.Name(field.type).removeprefix("TYPE_").lower()
    out = [field.number, count, field.type_name.lstrip(".") or scalar]
    if field.HasField("oneof_index") and not field.proto3_optional:
        out.append(message.oneof_decl[field.oneof_index].name)
    return out


@pytest.mark.parametrize("module", FILES, ids=lambda m: m.DESCRIPTOR.name)
def test_fields_enums_and_methods(module):
    file = descriptor_pb2.FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(file)
    checked = 0
    for name, message in messages(f"{file.package}.", file.message_type):
        theirs = FACTS["messages"][name]
        for field in message.field:
            assert shape(field, message) == theirs[field.name], f"{name}.{field.name}"
            checked += 1
    for enum in file.enum_type:
        ours = {value.name: value.number for value in enum.value}
        assert ours == FACTS["enums"][f"{file.package}.{enum.name}"]
    for service in file.service:
        for method in service.method:
            assert [
                method.client_streaming,
                method.input_type[1:],
                method.server_streaming,
                method.output_type[1:],
            ] == FACTS["methods"][f"{file.package}.{service.name}/{method.name}"]
    assert checked > 15
