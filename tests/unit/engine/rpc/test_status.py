import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from engine.base.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    Mismatch,
    NotFound,
    NotOffered,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from engine.rpc.status import DETAILS_KEY, LOST_KEY, PUSHBACK_KEY, from_rpc_error, to_status

ROUND_TRIPS = [
    (InvalidRequest("sampling.top_p", "expected (0, 1]"), grpc.StatusCode.INVALID_ARGUMENT),
    (NotOffered("constraint"), grpc.StatusCode.UNIMPLEMENTED),
    (NotFound("no model x"), grpc.StatusCode.NOT_FOUND),
    (Mismatch("another incarnation"), grpc.StatusCode.FAILED_PRECONDITION),
    (Overloaded("queue full", 2.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (Unavailable("lost", 0.25, 17, lost="prefill"), grpc.StatusCode.UNAVAILABLE),
    (DeadlineExceeded("too late"), grpc.StatusCode.DEADLINE_EXCEEDED),
    (Unauthenticated("no token"), grpc.StatusCode.UNAUTHENTICATED),
    (PermissionDenied("another token"), grpc.StatusCode.PERMISSION_DENIED),
]


def as_rpc_error(error):
    status = to_status(error)
    return grpc.aio.AioRpcError(
        status.code,
        grpc.aio.Metadata(),
        grpc.aio.Metadata(*status.trailing_metadata),
        status.message,
    )


@pytest.mark.parametrize(("error", "code"), ROUND_TRIPS)
def test_every_error_survives_the_wire(error, code):
    assert to_status(error).code is code
    back = from_rpc_error(as_rpc_error(error))
    assert type(back) is type(error)
    assert back.message == error.message
    for name in ("field", "description", "retry_after_s", "num_emitted", "lost"):
        assert getattr(back, name, None) == getattr(error, name, None)


def test_an_unknown_method_differs_from_an_unsupported_field():
    call = (grpc.StatusCode.UNIMPLEMENTED, grpc.aio.Metadata(), grpc.aio.Metadata())
    back = from_rpc_error(grpc.aio.AioRpcError(*call, "Method not found!"))
    assert back.message == "Method not found: expected a coordinator's gRPC port, not a worker's"
    assert to_status(back).code is grpc.StatusCode.UNIMPLEMENTED


def test_details_are_google_rpc_details():
    metadata = dict(to_status(Unavailable("lost", 0.25, 17)).trailing_metadata)
    assert metadata[PUSHBACK_KEY] == "250"
    assert LOST_KEY not in metadata
    status = status_pb2.Status.FromString(metadata[DETAILS_KEY])
    retry, info = error_details_pb2.RetryInfo(), error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 250
    assert status.details[1].Unpack(info)
    assert dict(info.metadata) == {"num_emitted": "17"}


def test_other_errors_are_internal():
    assert to_status(ConfigError("x")).code is grpc.StatusCode.INTERNAL


def test_a_long_message_is_cut_to_fit_the_headers():
    status = to_status(InvalidRequest("text", "y" * 100_000))
    assert len(status.message) < 2000
    assert sum(len(value) for _, value in status.trailing_metadata) < 8000


def test_foreign_statuses_without_details():
    def error(code):
        return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "text")

    lost = from_rpc_error(error(grpc.StatusCode.UNAVAILABLE))
    assert isinstance(lost, Unavailable)
    assert (lost.num_emitted, lost.lost) == (0, "")
    assert from_rpc_error(error(grpc.StatusCode.INTERNAL)) is None
    assert from_rpc_error(error(grpc.StatusCode.CANCELLED)) is None


@pytest.mark.parametrize("text", ["\N{SLIGHTLY SMILING FACE}", "%", "a\nb", "x"])
def test_a_long_message_fits_the_headers_that_peers_accept(text):
    status = to_status(InvalidRequest("text", text * 5000))
    encoded = sum(1 if 32 <= b < 127 and b != 37 else 3 for b in status.message.encode())
    details = dict(status.trailing_metadata)[DETAILS_KEY]
    assert 900 < encoded <= 1000
    assert encoded + len(details) * 4 / 3 < 8192 / 2


@pytest.mark.parametrize("error", [InvalidRequest, NotOffered])
@pytest.mark.parametrize("char", ["\N{LATIN SMALL LETTER E WITH ACUTE}", "a"])
def test_a_long_name_of_a_field_fits_as_well(error, char):
    """Clients choose the keys of a map: `parameters[...]`."""
    field = f"parameters[{char * 100_000}]"
    given = (field, "not known; " + char * 5000) if error is InvalidRequest else (field,)
    status = to_status(error(*given))
    details = dict(status.trailing_metadata)[DETAILS_KEY]
    assert len(status.message.encode()) * 3 + len(details) * 4 / 3 < 8192
