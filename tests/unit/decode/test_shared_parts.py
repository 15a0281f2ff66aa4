"""PartsStore: which parts a key stands for, and how long."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import pytest

from decode.shared_parts import PartsStore
from engine.base.errors import InvalidRequest
from engine.base.types import ConstraintKind
from engine.pb.diptych.internal.v1 import worker_pb2 as pb


def check(ids: Sequence[int]) -> None:
    if any(token >= 100 for token in ids):
        raise InvalidRequest("token_ids", "beyond the vocabulary")


def carrying(key: bytes, token: int = 1) -> pb.DecodeRequest:
    return pb.DecodeRequest(
        shared_key=key,
        prompt_token_ids=[token, 2],
        sampling=pb.SamplingParams(logit_bias={7: 0.5, 3: 1.0}),
        stop=pb.StopParams(stop_token_ids=[9]),
        constraint=pb.Constraint(kind=pb.Constraint.KIND_REGEX, source="a+"),
    )


def test_a_key_stands_for_what_came_with_it() -> None:
    store = PartsStore(check)
    assert store.of(pb.DecodeRequest(shared_key=b"k")) is None
    parts = store.of(carrying(b"k"))
    assert parts is not None
    assert parts.prompt == (1, 2)
    assert parts.logit_bias == ((3, 1.0), (7, 0.5))
    assert parts.stop_token_ids == {9}
    assert parts.constraint is not None
    assert parts.constraint.kind is ConstraintKind.REGEX
    assert store.of(pb.DecodeRequest(shared_key=b"k")) is parts
    assert store.of(pb.DecodeRequest(shared_key=b"other")) is None


def test_without_a_key_nothing_is_kept() -> None:
    store = PartsStore(check)
    parts = store.of(carrying(b""))
    assert parts is not None
    assert not store._held
    assert not store._recent


def test_parts_live_as_long_as_a_call_or_a_few_requests_more() -> None:
    store = PartsStore(check)
    held = store.of(carrying(b"held"))
    store.of(carrying(b"short"))
    for i in range(4):
        store.of(carrying(f"{i}".encode()))
    gc.collect()
    assert store.of(pb.DecodeRequest(shared_key=b"held")) is held
    assert store.of(pb.DecodeRequest(shared_key=b"short")) is None
    assert len(store._held) == 5


def test_bad_tokens_are_not_kept() -> None:
    store = PartsStore(check)
    with pytest.raises(InvalidRequest):
        store.of(carrying(b"k", token=100))
    assert store.of(pb.DecodeRequest(shared_key=b"k")) is None
