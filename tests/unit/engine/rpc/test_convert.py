import numpy as np
import pytest

from engine.base.errors import InvalidRequest
from engine.base.types import (
    Constraint,
    ConstraintKind,
    FinishReason,
    Health,
    ModelIdentity,
    Peer,
    Role,
    SamplingParams,
    StopParams,
    TokenLogprobs,
)
from engine.pb.diptych.internal.v1 import registry_pb2, worker_pb2
from engine.rpc import convert


def test_sampling_round_trip():
    params = SamplingParams(
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        frequency_penalty=-1.5,
        presence_penalty=2.0,
        repetition_penalty=1.25,
        seed=2**64 - 1,
        logit_bias=((3, -100.0), (49151, 0.5)),
    )
    wire = convert.sampling_to_pb(params).SerializeToString()
    pb = worker_pb2.SamplingParams.FromString(wire)
    bias = tuple(sorted(pb.logit_bias.items()))
    assert convert.sampling_from_pb(pb, bias) == params
    assert convert.sampling_from_pb(worker_pb2.SamplingParams(top_p=0.7), ()).top_p == float(
        np.float32(0.7)
    )


def test_stop_round_trip():
    params = StopParams(max_tokens=9, min_tokens=2, stop_token_ids=frozenset({2, 0, 5}))
    pb = convert.stop_to_pb(params)
    assert list(pb.stop_token_ids) == [0, 2, 5]
    assert convert.stop_from_pb(pb, frozenset(pb.stop_token_ids)) == params


def test_peer_and_its_absence():
    peer = Peer("p0", "abc", "127.0.0.1:1")
    request = worker_pb2.DecodeRequest(prefill=convert.to_pb(worker_pb2.PrefillPeer, peer))
    assert convert.prefill_peer_of(request) == peer
    assert convert.prefill_peer_of(worker_pb2.DecodeRequest()) is None


def test_identity_reason_role():
    model = ModelIdentity("m", "00ff", "p", 8192, 16, 49152, "0a")
    pb = convert.to_pb(registry_pb2.ModelIdentity, model)
    assert convert.from_pb(ModelIdentity, pb) == model
    for member in (*FinishReason, *Role, *Health):
        number = convert.enum_to_pb(member)
        assert convert.enum_from_pb(type(member), number, None) is member
    assert convert.enum_from_pb(Role, registry_pb2.ROLE_UNSPECIFIED, None) is None
    assert convert.enum_from_pb(FinishReason, 99, FinishReason.ABORTED) is FinishReason.ABORTED


def test_logprobs_round_trip():
    scored = [TokenLogprobs(-0.5, (7, 3), (-0.5, -1.25)), TokenLogprobs(-9.0, (), ())]
    assert convert.logprobs_from_pb(convert.logprobs_to_pb(scored)) == scored
    assert convert.logprobs_from_pb(convert.logprobs_to_pb([])) == []


def test_constraint_and_its_absence():
    assert convert.constraint_of(worker_pb2.DecodeRequest()) is None
    for kind in ConstraintKind:
        wanted = Constraint(kind, "source é", leading_text=" ")
        request = worker_pb2.DecodeRequest(constraint=convert.to_pb(worker_pb2.Constraint, wanted))
        assert convert.constraint_of(request) == wanted
    with pytest.raises(InvalidRequest, match=r"constraint\.kind"):
        convert.constraint_of(worker_pb2.DecodeRequest(constraint=worker_pb2.Constraint(kind=99)))
