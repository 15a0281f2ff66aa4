"""Errors <-> gRPC statuses with google.rpc details. Only this module maps them:

    InvalidRequest    INVALID_ARGUMENT    BadRequest{field}
    NotOffered        UNIMPLEMENTED       BadRequest{field}
    NotFound          NOT_FOUND
    Mismatch          FAILED_PRECONDITION
    Overloaded        RESOURCE_EXHAUSTED  RetryInfo, grpc-retry-pushback-ms
    TooLarge          RESOURCE_EXHAUSTED
    Unavailable       UNAVAILABLE         the same, ErrorInfo{num_emitted}, diptych-lost,
                                          diptych-sick
    DeadlineExceeded  DEADLINE_EXCEEDED
    WorkersLost       INTERNAL            ErrorInfo{num_emitted}
    anything else     INTERNAL

Other kinds of `DiptychError` (ConfigError, CheckpointError) are bugs in a call: INTERNAL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]

from engine.base import errors

DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
LOST_KEY = "diptych-lost"
SICK_KEY = "diptych-sick"
ERROR_DOMAIN = "diptych"
WORKERS_LOST = "WORKERS_LOST"  # the reason of an ErrorInfo
# A message is sent twice in HTTP/2 headers: percent-encoded, and in the details. By default peers
# accept 8 KiB of headers, and replace a larger status.
_MAX_MESSAGE_BYTES = 1000


@dataclass(frozen=True, slots=True)
class RpcStatus:
    """The trailers of a failed call."""

    code: grpc.StatusCode
    message: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


_Code = grpc.StatusCode
# Errors that are their message alone, in both directions.
_PLAIN: dict[type[errors.DiptychError], grpc.StatusCode] = {
    errors.NotFound: _Code.NOT_FOUND,
    errors.Mismatch: _Code.FAILED_PRECONDITION,
    errors.Unauthenticated: _Code.UNAUTHENTICATED,
    errors.PermissionDenied: _Code.PERMISSION_DENIED,
    errors.DeadlineExceeded: _Code.DEADLINE_EXCEEDED,
}
_CODES = _PLAIN | {
    errors.InvalidRequest: _Code.INVALID_ARGUMENT,
    errors.NotOffered: _Code.UNIMPLEMENTED,
    errors.Overloaded: _Code.RESOURCE_EXHAUSTED,
    errors.TooLarge: _Code.RESOURCE_EXHAUSTED,
    errors.Unavailable: _Code.UNAVAILABLE,
}
_FROM_CODE = {code: kind for kind, code in _PLAIN.items()}


def to_status(error: errors.DiptychError) -> RpcStatus:
    """The status that reports `error`."""
    code = next((c for kind, c in _CODES.items() if isinstance(error, kind)), _Code.INTERNAL)
    message = clip(error.message)
    details: list[Message] = []
    metadata: list[tuple[str, str | bytes]] = []
    if isinstance(error, errors.InvalidRequest):
        details.append(_bad_request(error.field, error.description))
    elif isinstance(error, errors.NotOffered):
        details.append(_bad_request(error.field, message))
    elif isinstance(error, errors.Overloaded | errors.Unavailable):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(error.retry_after_s * 1000))
        details.append(retry)
        metadata.append((PUSHBACK_KEY, str(round(error.retry_after_s * 1000))))
    if isinstance(error, errors.Unavailable | errors.WorkersLost):
        reason = WORKERS_LOST if isinstance(error, errors.WorkersLost) else "UNAVAILABLE"
        info = error_details_pb2.ErrorInfo(reason=reason, domain=ERROR_DOMAIN)
        info.metadata["num_emitted"] = str(error.num_emitted)
        details.append(info)
    if isinstance(error, errors.Unavailable) and error.lost:
        metadata.append((LOST_KEY, error.lost))
    if isinstance(error, errors.Unavailable) and error.sick:
        metadata.append((SICK_KEY, "1"))
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        status.details.add().Pack(detail)
    metadata.append((DETAILS_KEY, status.SerializeToString()))
    return RpcStatus(code, message, tuple(metadata))


def clip(text: str) -> str:
    """The longest prefix of `text` within the bound, percent-encoded."""
    num_bytes = 0
    for i, char in enumerate(text[:_MAX_MESSAGE_BYTES]):
        plain = char.isascii() and char.isprintable() and char != "%"
        num_bytes += 1 if plain else 3 * len(char.encode())
        if num_bytes > _MAX_MESSAGE_BYTES:
            return text[:i]
    return text[:_MAX_MESSAGE_BYTES]


def internal(message: str) -> RpcStatus:
    """The status of a bug; the cause is in the log only."""
    status = status_pb2.Status(code=code_pb2.INTERNAL, message=message)
    return RpcStatus(_Code.INTERNAL, message, ((DETAILS_KEY, status.SerializeToString()),))


def _bad_request(field: str, description: str) -> Message:
    violation = error_details_pb2.BadRequest.FieldViolation(
        field=clip(field), description=clip(description)
    )
    details: Message = error_details_pb2.BadRequest(field_violations=[violation])
    return details


def from_rpc_error(error: grpc.RpcError) -> errors.DiptychError | None:
    """The inverse of `to_status`, for errors of grpc and grpc.aio; None: a bug or a cancellation.

    A lost connection is `Unavailable` too.
    """
    call: Any = error
    code, message = call.code(), call.details() or ""
    metadata = dict(call.trailing_metadata() or ())
    bad, retry, info = _details(metadata.get(DETAILS_KEY))
    retry_after_s = retry.retry_delay.ToMilliseconds() / 1000 if retry else 1.0
    num_emitted = int(info.metadata.get("num_emitted", "0")) if info else 0
    violation = bad.field_violations[0] if bad and bad.field_violations else None
    if plain := _FROM_CODE.get(code):
        return plain(message)
    match code:
        case _Code.INVALID_ARGUMENT:
            if violation:
                return errors.InvalidRequest(violation.field, violation.description)
            return errors.InvalidRequest("request", message)
        case _Code.UNIMPLEMENTED:
            if not violation:
                return errors.UnknownMethod(message)
            field = violation.field
            why = violation.description.removeprefix(field).strip()
            return errors.NotOffered(field, why) if why else errors.NotOffered(field)
        case _Code.RESOURCE_EXHAUSTED:
            return errors.Overloaded(message, retry_after_s)
        case _Code.UNAVAILABLE:
            lost = str(metadata.get(LOST_KEY, ""))
            sick = SICK_KEY in metadata
            return errors.Unavailable(message, retry_after_s, num_emitted, lost, sick=sick)
        case _Code.INTERNAL if info and info.reason == WORKERS_LOST:
            return errors.WorkersLost(message, num_emitted)
    return None


def _details(raw: str | bytes | None) -> tuple[Any, Any, Any]:
    """BadRequest, RetryInfo and ErrorInfo of a serialized google.rpc.Status; None where absent."""
    bad, retry, info = None, None, None
    if not isinstance(raw, bytes):
        return bad, retry, info
    try:
        for detail in status_pb2.Status.FromString(raw).details:
            bad = _unpack(detail, error_details_pb2.BadRequest()) or bad
            retry = _unpack(detail, error_details_pb2.RetryInfo()) or retry
            info = _unpack(detail, error_details_pb2.ErrorInfo()) or info
    except DecodeError:
        pass
    return bad, retry, info


def _unpack(detail: AnyMessage, into: Any) -> Any:
    return into if detail.Unpack(into) else None
