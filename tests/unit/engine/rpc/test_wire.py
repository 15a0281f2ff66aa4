"""Fields are counted on the wire, nested messages included."""

from __future__ import annotations

import random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from engine.pb.diptych.v1 import inference_pb2 as pb
from engine.rpc.wire import has_too_many_fields


def num_fields(message: Message) -> int:
    """The count of a parsed message."""
    count = 0
    for field, value in message.ListFields():
        of: Any = field.message_type
        if of is not None and of.GetOptions().map_entry:
            count += sum(1 + 2 for _ in value)
        elif field.is_repeated and field.type == FieldDescriptor.TYPE_MESSAGE:
            count += sum(1 + num_fields(item) for item in value)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            count += 1 + num_fields(value)
        elif field.is_repeated and field.type == FieldDescriptor.TYPE_STRING:
            count += len(value)
        else:
            count += 1
    return count


requests = [
    pb.GenerateRequest(text="a\x08" * 500),
    pb.GenerateRequest(token_ids=pb.TokenIds(ids=range(3000))),
    pb.GenerateRequest(
        sampling=pb.Sampling(temperature=0.5, logit_bias=dict.fromkeys(range(700), 1.0)),
        stop=pb.Stop(stop=["a", "", "b"], stop_token_ids=[1, 2]),
        resume=[pb.Resume(index=i, token_ids=[1] * i) for i in range(9)],
    ),
    pb.ChatRequest(messages=[pb.Message()] * 50),
    pb.ChatRequest(
        messages=[pb.Message(role="user", tool_calls=[pb.ToolCall(name="f")] * 3)] * 20,
        constraint=pb.Constraint(choice=pb.Choices(choices=["a"] * 30)),
    ),
    pb.GenerateRequest(),
]


def test_the_count_is_exact() -> None:
    for request in requests:
        size = num_fields(request)
        raw = request.SerializeToString()
        assert not has_too_many_fields(raw, request.DESCRIPTOR, size)
        assert not size or has_too_many_fields(raw, request.DESCRIPTOR, size - 1)


@given(st.binary(max_size=200))
def test_counting_ends_on_any_bytes(raw: bytes) -> None:
    has_too_many_fields(raw, pb.ChatRequest.DESCRIPTOR)


def test_damaged_messages_are_left_to_the_parser() -> None:
    rng = random.Random(7)
    for request in requests:
        raw = bytearray(request.SerializeToString())
        for _ in range(50):
            if raw:
                raw[rng.randrange(len(raw))] = rng.randrange(256)
            has_too_many_fields(bytes(raw), request.DESCRIPTOR)


def test_many_empty_messages_are_too_many() -> None:
    (messages,) = (f for f in pb.ChatRequest.DESCRIPTOR.fields if f.name == "messages")
    raw = bytes([messages.number << 3 | 2, 0]) * 600_000
    assert has_too_many_fields(raw, pb.ChatRequest.DESCRIPTOR)
