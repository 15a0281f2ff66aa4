"""Protobuf messages <-> engine.base.types. Only this module and services use protobuf types.

Floats have 32 bits on the wire: a worker computes with the client's value rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

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
_D = TypeVar("_D")
_E = TypeVar("_E", bound=Enum)
_NUMBERS: dict[Enum, int] = {
    Health.OK: registry_pb2.HEALTH_UNSPECIFIED,
    Health.DEGRADED: registry_pb2.HEALTH_DEGRADED,
    Health.SICK: registry_pb2.HEALTH_SICK,
    Role.PREFILL: registry_pb2.ROLE_PREFILL,
    Role.DECODE: registry_pb2.ROLE_DECODE,
    **{r: getattr(inference_pb2, f"FINISH_REASON_{r.name}") for r in FinishReason},
    **{k: getattr(worker_pb2.Constraint, f"KIND_{k.name}") for k in ConstraintKind},
}


def to_pb(kind: Callable[..., _T], value: Any, /, **others: Any) -> _T:
    """A message of the fields that it shares with a dataclass, by name; `others` are not read.

    Nested dataclasses, and tuples of them, become messages too.
    """
    names = cast(Any, kind).DESCRIPTOR.fields_by_name.keys() - others.keys()
    shared = [name for name in _types_of(cast(Any, type(value))) if name in names]
    return kind(**{name: _plain(getattr(value, name)) for name in shared}, **others)


def from_pb(kind: Callable[..., _T], pb: Any, /, **others: Any) -> _T:
    """The inverse of to_pb, but for enums; `others` are not read from the message."""
    inner = {name: of for name, of in _types_of(kind).items() if name not in others}
    return kind(**{name: _value_of(of, getattr(pb, name)) for name, of in inner.items()}, **others)


def optional(pb: Any, name: str) -> Any:
    """A field of a message, None where it is unset."""
    return getattr(pb, name) if pb.HasField(name) else None


def enum_to_pb(member: Enum) -> Any:
    """The number of an enum's member on the wire."""
    return _NUMBERS[member]


def enum_from_pb(kind: type[_E], number: int, unknown: _D) -> _E | _D:
    """The inverse of enum_to_pb; `unknown` for any other number."""
    return next((member for member in kind if _NUMBERS[member] == number), unknown)


def _plain(value: Any) -> Any:
    """A dataclass as a dictionary, which protobuf takes for a nested message."""
    if is_dataclass(value):
        return {name: _plain(getattr(value, name)) for name in _types_of(cast(Any, type(value)))}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return enum_to_pb(value) if isinstance(value, Enum) else value


def _value_of(kind: Any, pb: Any) -> Any:
    if get_origin(kind) is tuple:
        return tuple(_value_of(get_args(kind)[0], each) for each in pb)
    nested: Any = kind if is_dataclass(kind) else None
    return from_pb(nested, pb) if nested else pb


@cache
def _types_of(kind: Callable[..., object]) -> dict[str, Any]:
    """Types by name of a dataclass's fields."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(cast(Any, kind))}


def sampling_to_pb(params: SamplingParams) -> worker_pb2.SamplingParams:
    """Sampling parameters on the wire. All fields are set: workers apply no defaults."""
    return to_pb(worker_pb2.SamplingParams, params, logit_bias=dict(params.logit_bias))


def sampling_from_pb(
    pb: worker_pb2.SamplingParams, logit_bias: tuple[tuple[int, float], ...]
) -> SamplingParams:
    """The inverse of sampling_to_pb; `logit_bias` is sorted by token id."""
    return from_pb(SamplingParams, pb, logit_bias=logit_bias)


def stop_to_pb(params: StopParams) -> worker_pb2.StopParams:
    """Stop parameters on the wire. Token ids are sorted, so equal parameters are equal bytes."""
    return to_pb(worker_pb2.StopParams, params, stop_token_ids=sorted(params.stop_token_ids))


def stop_from_pb(pb: worker_pb2.StopParams, stop_token_ids: frozenset[int]) -> StopParams:
    """The inverse of stop_to_pb; the caller passes the ids, which may be shared."""
    return StopParams(pb.max_tokens, pb.min_tokens, stop_token_ids)


def constraint_of(request: worker_pb2.DecodeRequest) -> Constraint | None:
    """The request's constraint, or None. Raises InvalidRequest for an unknown kind."""
    if not request.HasField("constraint"):
        return None
    kind = enum_from_pb(ConstraintKind, request.constraint.kind, None)
    if kind is None:
        raise InvalidRequest("constraint.kind", f"{request.constraint.kind} is not known")
    return from_pb(Constraint, request.constraint, kind=kind)


def logprobs_to_pb(scored: Iterable[TokenLogprobs]) -> list[worker_pb2.Logprobs]:
    """Log-probabilities on the wire, one message a position."""
    return [
        worker_pb2.Logprobs(chosen=s.chosen, token_ids=s.token_ids, logprobs=s.logprobs)
        for s in scored
    ]


def logprobs_from_pb(scored: Iterable[worker_pb2.Logprobs]) -> list[TokenLogprobs]:
    """The inverse of logprobs_to_pb."""
    return [TokenLogprobs(s.chosen, tuple(s.token_ids), tuple(s.logprobs)) for s in scored]


def prefill_peer_of(request: worker_pb2.DecodeRequest) -> Peer | None:
    """The request's prefill worker; None: the decode worker computes the prompt."""
    return from_pb(Peer, request.prefill) if request.HasField("prefill") else None
