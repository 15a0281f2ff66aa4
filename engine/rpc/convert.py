"""Protobuf messages <-> engine.base.types. Only this module and services use protobuf types.

Floats have 32 bits on the wire: a worker computes with the client's value rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, TypeVar, cast

from engine.base.errors import InvalidRequest
from engine.base.types import (
    Constraint,
    ConstraintKind,
    FinishReason,
    Health,
    Peer,
    Role,
    SamplingParams,
    StopParams,
    TokenLogprobs,
)
from engine.pb.diptych.internal.v1 import registry_pb2, worker_pb2
from engine.pb.diptych.v1 import inference_pb2

_T = TypeVar("_T")
_REASON_TO_PB: dict[FinishReason, inference_pb2.FinishReason] = {
    reason: getattr(inference_pb2, f"FINISH_REASON_{reason.name}") for reason in FinishReason
}
_REASON_FROM_PB = {pb: reason for reason, pb in _REASON_TO_PB.items()}
_KIND_TO_PB: dict[ConstraintKind, worker_pb2.Constraint.Kind] = {
    kind: getattr(worker_pb2.Constraint, f"KIND_{kind.name}") for kind in ConstraintKind
}
_KIND_FROM_PB = {pb: kind for kind, pb in _KIND_TO_PB.items()}
_HEALTH_TO_PB = {
    Health.OK: registry_pb2.HEALTH_UNSPECIFIED,
    Health.DEGRADED: registry_pb2.HEALTH_DEGRADED,
    Health.SICK: registry_pb2.HEALTH_SICK,
}
_HEALTH_FROM_PB = {pb: health for health, pb in _HEALTH_TO_PB.items()}
_ROLE_TO_PB = {Role.PREFILL: registry_pb2.ROLE_PREFILL, Role.DECODE: registry_pb2.ROLE_DECODE}
_ROLE_FROM_PB = {pb: role for role, pb in _ROLE_TO_PB.items()}


def values_of(value: Any) -> dict[str, Any]:
    """The fields of a dataclass by name, for a message with the same fields."""
    return {field.name: getattr(value, field.name) for field in fields(value)}


def from_pb(kind: Callable[..., _T], pb: Any, **others: Any) -> _T:
    """A dataclass of the message's fields of the same names; `others` are not read from it."""
    names = [field.name for field in fields(cast(Any, kind)) if field.name not in others]
    return kind(**{name: getattr(pb, name) for name in names}, **others)


def sampling_to_pb(params: SamplingParams) -> worker_pb2.SamplingParams:
    """Sampling parameters on the wire. All fields are set: workers apply no defaults."""
    values = values_of(params) | {"logit_bias": dict(params.logit_bias)}
    return worker_pb2.SamplingParams(**values)


def sampling_from_pb(
    pb: worker_pb2.SamplingParams, logit_bias: tuple[tuple[int, float], ...]
) -> SamplingParams:
    """The inverse of sampling_to_pb; `logit_bias` is sorted by token id."""
    return from_pb(SamplingParams, pb, logit_bias=logit_bias)


def stop_to_pb(params: StopParams) -> worker_pb2.StopParams:
    """Stop parameters on the wire. Token ids are sorted, so equal parameters are equal bytes."""
    return worker_pb2.StopParams(
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        stop_token_ids=sorted(params.stop_token_ids),
    )


def stop_from_pb(pb: worker_pb2.StopParams, stop_token_ids: frozenset[int]) -> StopParams:
    """The inverse of stop_to_pb; the caller passes the ids, which may be shared."""
    return StopParams(pb.max_tokens, pb.min_tokens, stop_token_ids)


def constraint_to_pb(constraint: Constraint | None) -> worker_pb2.Constraint | None:
    """A constraint on the wire; None leaves the field unset."""
    if constraint is None:
        return None
    return worker_pb2.Constraint(
        kind=_KIND_TO_PB[constraint.kind],
        source=constraint.source,
        leading_text=constraint.leading_text,
    )


def constraint_of(request: worker_pb2.DecodeRequest) -> Constraint | None:
    """The request's constraint, or None. Raises InvalidRequest for an unknown kind."""
    if not request.HasField("constraint"):
        return None
    kind = _KIND_FROM_PB.get(request.constraint.kind)
    if kind is None:
        raise InvalidRequest("constraint.kind", f"{request.constraint.kind} is not known")
    return Constraint(kind, request.constraint.source, request.constraint.leading_text)


def logprobs_to_pb(scored: Iterable[TokenLogprobs]) -> list[worker_pb2.Logprobs]:
    """Log-probabilities on the wire, one message a position."""
    return [
        worker_pb2.Logprobs(chosen=s.chosen, token_ids=s.token_ids, logprobs=s.logprobs)
        for s in scored
    ]


def logprobs_from_pb(scored: Iterable[worker_pb2.Logprobs]) -> list[TokenLogprobs]:
    """The inverse of logprobs_to_pb."""
    return [TokenLogprobs(s.chosen, tuple(s.token_ids), tuple(s.logprobs)) for s in scored]


def peer_to_pb(peer: Peer) -> worker_pb2.PrefillPeer:
    """The prefill worker that a decode worker calls, on the wire."""
    return worker_pb2.PrefillPeer(**values_of(peer))


def prefill_peer_of(request: worker_pb2.DecodeRequest) -> Peer | None:
    """The request's prefill worker; None: the decode worker computes the prompt."""
    return from_pb(Peer, request.prefill) if request.HasField("prefill") else None


def reason_to_pb(reason: FinishReason) -> inference_pb2.FinishReason:
    """A finish reason on the wire."""
    return _REASON_TO_PB[reason]


def reason_from_pb(pb: inference_pb2.FinishReason) -> FinishReason:
    """The inverse of reason_to_pb; an unknown reason is ABORTED."""
    return _REASON_FROM_PB.get(pb, FinishReason.ABORTED)


def role_to_pb(role: Role) -> registry_pb2.Role:
    """A worker's role on the wire."""
    return _ROLE_TO_PB[role]


def role_from_pb(pb: registry_pb2.Role) -> Role | None:
    """The inverse of role_to_pb; None if unset or unknown."""
    return _ROLE_FROM_PB.get(pb)


def health_to_pb(health: Health) -> registry_pb2.Health:
    """A worker's health on the wire."""
    return _HEALTH_TO_PB[health]


def health_from_pb(pb: registry_pb2.Health) -> Health:
    """The inverse of health_to_pb; an unknown value is DEGRADED."""
    return _HEALTH_FROM_PB.get(pb, Health.DEGRADED)
