"""Errors in OpenAI's shape, and the one table of gRPC statuses -> HTTP statuses.

    gRPC                  HTTP                  type                      code
    INVALID_ARGUMENT      400                   invalid_request_error
    UNIMPLEMENTED         400                   invalid_request_error     unsupported_parameter
    UNAUTHENTICATED       401                   authentication_error      invalid_api_key
    PERMISSION_DENIED     403                   permission_error
    NOT_FOUND             404                   invalid_request_error     model_not_found
    RESOURCE_EXHAUSTED    429 + Retry-After     rate_limit_error          rate_limit_exceeded
    UNAVAILABLE           503 + Retry-After     service_unavailable       service_unavailable
    DEADLINE_EXCEEDED     504                   timeout_error             deadline_exceeded
    INTERNAL WORKERS_LOST 500 x-should-retry    server_error              workers_lost
    all others            500                   server_error              internal_error

OpenAI's client tries again after 408, 409, 429 and from 500 on. So a request that must fail again
gets 400, also where it asks for a thing that is not supported here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc

from engine.base.errors import (
    DiptychError,
    InvalidRequest,
    NotOffered,
    Overloaded,
    Unavailable,
    WorkersLost,
)
from engine.rpc.status import clip, to_status

_Code = grpc.StatusCode
_INVALID = "invalid_request_error"
_TABLE: dict[grpc.StatusCode, tuple[int, str, str | None]] = {
    _Code.INVALID_ARGUMENT: (400, _INVALID, None),
    _Code.UNIMPLEMENTED: (400, _INVALID, "unsupported_parameter"),
    _Code.UNAUTHENTICATED: (401, "authentication_error", "invalid_api_key"),
    _Code.PERMISSION_DENIED: (403, "permission_error", None),
    _Code.NOT_FOUND: (404, _INVALID, "model_not_found"),
    _Code.RESOURCE_EXHAUSTED: (429, "rate_limit_error", "rate_limit_exceeded"),
    _Code.UNAVAILABLE: (503, "service_unavailable", "service_unavailable"),
    _Code.DEADLINE_EXCEEDED: (504, "timeout_error", "deadline_exceeded"),
}
_OTHER = (500, "server_error", "internal_error")


@dataclass(frozen=True, slots=True)
class Failure:
    """A response that is an error."""

    status: int
    message: str
    type: str = _INVALID
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}


class Refused(DiptychError):
    """A request that this API refuses: its method, size, media type, an unknown option."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def unknown_parameter(name: str) -> Refused:
    """For an unknown option, which OpenAI refuses too."""
    message = f"Unknown parameter: '{name}'."
    return Refused(Failure(400, message, param=name, code="unknown_parameter"))


def unsupported(param: str, what: str) -> Refused:
    """For a thing that OpenAI or vLLM has and this API does not."""
    message = f"{param}: {what} is not supported"
    return Refused(Failure(400, message, param=param, code="unsupported_parameter"))


def failure_of(error: DiptychError, names: Mapping[str, str] | None = None) -> Failure:
    """The response to `error`; `names` maps fields of the frontend to those of the client."""
    if isinstance(error, Refused):
        return error.failure
    rpc_code = to_status(error).code
    if rpc_code is _Code.INTERNAL and not isinstance(error, WorkersLost):
        return INTERNAL
    status, kind, code = _TABLE.get(rpc_code, _OTHER)
    message, param, headers = error.message, None, {}
    if isinstance(error, InvalidRequest):
        param = param_of(error.field, names or {})
        message = f"{param}: {error.description}"
    elif isinstance(error, NotOffered):
        field, _, more = error.field.partition(" ")
        param = param_of(field, names or {})
        message = f"{param}{' ' if more else ''}{more} {error.why}"
    elif code == "model_not_found":
        param = "model"
    elif isinstance(error, Overloaded | Unavailable):
        after_s = max(0.0, error.retry_after_s)
        headers = {
            "retry-after": str(max(1, math.ceil(after_s))),
            "retry-after-ms": str(round(after_s * 1000)),
        }
    elif isinstance(error, WorkersLost):
        code, headers = "workers_lost", {"x-should-retry": "false"}  # OpenAI's clients obey it
    return Failure(status, clip(message), kind, param and clip(param), code, headers)


def param_of(field: str, names: Mapping[str, str]) -> str:
    """The option of the HTTP request that became this field of a request."""
    for prefix in sorted(names, key=len, reverse=True):
        if field == prefix or field.startswith((f"{prefix}.", f"{prefix}[")):
            return names[prefix] + field.removeprefix(prefix)
    group, dot, rest = field.partition(".")
    return rest if dot and group in ("sampling", "stop", "output") else field


INTERNAL = Failure(
    500, "internal error; the server's log tells more", "server_error", code="internal_error"
)
