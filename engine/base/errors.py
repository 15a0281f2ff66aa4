"""The errors a caller can do something about; `engine.rpc.status` makes gRPC statuses of them.

A message is one sentence that names the field or file and says what would be right.
"""

from __future__ import annotations


class DiptychError(Exception):
    """Base of all errors that are answers, not bugs."""

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
    """UNIMPLEMENTED: `field` is part of the protocol and not served yet, or not here."""

    def __init__(self, field: str, why: str = "is not implemented yet; leave it unset") -> None:
        super().__init__(f"{field} {why}")
        self.field = field
        self.why = why


class UnknownMethod(NotOffered):
    """UNIMPLEMENTED without a field: the server at that address is another kind of process."""

    def __init__(self, said: str) -> None:
        DiptychError.__init__(
            self, f"{said.rstrip('.!')}: expected a coordinator's gRPC port, not a worker's"
        )
        self.field, self.why = "method", "is unknown"


class Overloaded(DiptychError):
    """RESOURCE_EXHAUSTED + RetryInfo: try again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooLarge(DiptychError):
    """RESOURCE_EXHAUSTED: a message above the bound, as gRPC itself refuses one."""


class Unavailable(DiptychError):
    """UNAVAILABLE + RetryInfo: nobody can serve this now; `num_emitted` tokens were delivered.

    A worker names in `lost` the role of the peer that failed it ("prefill") where it is not itself
    the one.
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
        """`sick`: what that worker computed was not finite."""
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.num_emitted = num_emitted
        self.lost = lost
        self.sick = sick


class WorkerLost(Unavailable):
    """The worker was lost under the call: its process has ended, hangs or computes nonsense."""


class Silent(WorkerLost):
    """A call that is open and says nothing: its other end is stopped, cut off or hangs."""


class WorkersLost(DiptychError):
    """INTERNAL, ErrorInfo WORKERS_LOST: so many were lost under the request that it is ended."""

    def __init__(self, message: str, num_emitted: int = 0) -> None:
        super().__init__(message)
        self.num_emitted = num_emitted


class Unauthenticated(DiptychError):
    """UNAUTHENTICATED: the call brings no token where one is asked for."""


class PermissionDenied(DiptychError):
    """PERMISSION_DENIED: the call's token is not the one that is asked for."""


class SelfTestFailed(DiptychError):
    """This worker computes what it should not: the process must end."""


class Mismatch(DiptychError):
    """FAILED_PRECONDITION: not the model, digest, block size or incarnation that was meant."""


class DeadlineExceeded(DiptychError):
    """DEADLINE_EXCEEDED: the request's own time ran out."""
