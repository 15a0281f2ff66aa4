"""Errors that a caller can act on; `engine.rpc.status` converts them to gRPC statuses.

A message is one sentence that names the field or file and what is expected.
"""

from __future__ import annotations


class DiptychError(Exception):
    """Base of all expected errors."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(DiptychError):
    """A flag, file or environment value that cannot be used; ends a command with status 2."""


class CheckpointError(DiptychError):
    """A model file or folder that is missing, truncated or of an unknown kind."""


class InvalidRequest(DiptychError):
    """INVALID_ARGUMENT + BadRequest naming `field`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.description = message


class NotFound(DiptychError):
    """NOT_FOUND: an unknown model or adapter."""


class NotOffered(DiptychError):
    """UNIMPLEMENTED: `field` is part of the protocol, but this server does not support it."""

    def __init__(self, field: str, why: str = "is not implemented yet; leave it unset") -> None:
        super().__init__(f"{field} {why}")
        self.field = field
        self.why = why


class UnknownMethod(NotOffered):
    """UNIMPLEMENTED without a field: the server at that address is another kind of process."""

    def __init__(self, message: str) -> None:
        DiptychError.__init__(
            self, f"{message.rstrip('.!')}: expected a coordinator's gRPC port, not a worker's"
        )
        self.field, self.why = "method", "is unknown"


class Overloaded(DiptychError):
    """RESOURCE_EXHAUSTED + RetryInfo: try again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooLarge(DiptychError):
    """RESOURCE_EXHAUSTED: a message above the size limit; the same status as gRPC's own refusal."""


class Unavailable(DiptychError):
    """UNAVAILABLE + RetryInfo: no process can serve this now; `num_emitted` tokens were delivered.

    If a peer of the worker failed, and not the worker, `lost` is the peer's role ("prefill").
    """

    def __init__(
        self,
        message: str,
        retry_after_s: float = 1.0,
        num_emitted: int = 0,
        lost: str = "",
        *,
        sick: bool = False,
    ) -> None:
        """`sick`: the lost worker computed numbers that are not finite."""
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.num_emitted = num_emitted
        self.lost = lost
        self.sick = sick


class WorkerLost(Unavailable):
    """The worker was lost during the call: it ended, hangs, or computes wrong numbers."""


class Silent(WorkerLost):
    """A call without messages for too long: its peer is stopped, unreachable or hangs."""


class WorkersLost(DiptychError):
    """INTERNAL, ErrorInfo WORKERS_LOST: the request ends because it lost too many workers."""

    def __init__(self, message: str, num_emitted: int = 0) -> None:
        super().__init__(message)
        self.num_emitted = num_emitted


class Unauthenticated(DiptychError):
    """UNAUTHENTICATED: the call has no token, and needs one."""


class PermissionDenied(DiptychError):
    """PERMISSION_DENIED: the call has a wrong token."""


class SelfTestFailed(DiptychError):
    """This worker computes wrong numbers, so its process must end."""


class Mismatch(DiptychError):
    """FAILED_PRECONDITION: another model, digest, block size or incarnation than expected."""


class DeadlineExceeded(DiptychError):
    """DEADLINE_EXCEEDED: the request's deadline has passed."""
