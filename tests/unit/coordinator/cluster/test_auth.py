"""Tokens that a coordinator requires, and the meaning of a worker that refuses its own."""

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from coordinator.client import Client, blocking
from coordinator.cluster.auth import Trust
from coordinator.generation.decode_call import meaning_of
from engine.base.errors import ConfigError, PermissionDenied, Unauthenticated, Unavailable
from engine.base.option_groups import AuthOptions, FrontOptions
from engine.pb.diptych.v1 import admin_pb2
from engine.rpc.auth import ClusterToken
from engine.rpc.status import to_status


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "token"
    path.write_text("0123456789abcdef")
    return AuthOptions(str(path))


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("listen", ["127.0.0.1:1", "0.0.0.0:1"])
def test_the_token_of_a_file_is_required_everywhere(file, local, listen):
    trust = Trust.of(file, FrontOptions(listen=listen), local_workers=local)
    assert trust.cluster == trust.operator is not None
    trust.cluster.check((("authorization", "Bearer 0123456789abcdef"),))


def test_local_workers_get_a_token_of_their_own():
    first, second = (Trust.of(AuthOptions(), FrontOptions(), local_workers=True) for _ in "ab")
    assert first.cluster is not None and first.cluster != second.cluster
    assert first.operator == first.cluster


def test_operators_need_a_token_without_a_file_too():
    for front, local in (
        (FrontOptions(), True),
        (FrontOptions(), False),
        (FrontOptions(listen="0.0.0.0:1"), True),
        (FrontOptions(internal_listen="127.0.0.1:2"), False),
        (FrontOptions(listen="0.0.0.0:1", internal_listen="127.0.0.1:2"), False),
    ):
        trust = Trust.of(AuthOptions(), front, local_workers=local)
        with pytest.raises(Unauthenticated):
            trust.operator.check(())
        with pytest.raises(PermissionDenied):
            trust.operator.check(Trust().operator.metadata)


def test_workers_that_dial_in_from_elsewhere_need_a_file():
    for options, flag in (
        ({"listen": "0.0.0.0:1"}, "--listen 0.0.0.0:1"),
        ({"internal_listen": "10.0.0.1:2"}, "--internal-listen 10.0.0.1:2"),
    ):
        with pytest.raises(ConfigError, match="--cluster-token-file") as caught:
            Trust.of(AuthOptions(), FrontOptions(**options), local_workers=False)
        assert caught.value.message.startswith(flag)
    trust = Trust.of(AuthOptions(), FrontOptions(), local_workers=False)
    assert trust.cluster is None


@pytest.mark.parametrize("error", [Unauthenticated("no token"), PermissionDenied("another")])
def test_a_worker_that_refuses_the_coordinator_has_failed(error):
    """The client's credentials are not the reason, and another worker may accept the call."""
    status = to_status(error)
    refused = grpc.aio.AioRpcError(
        status.code, grpc.aio.Metadata(), grpc.aio.Metadata(*status.trailing_metadata), "said"
    )
    meaning = meaning_of(refused, num_emitted=0)
    assert isinstance(meaning, Unavailable)
    assert "said" in meaning.message


def test_a_token_that_is_found_is_sent_to_the_address_of_its_process(monkeypatch):
    """A name may lead to further addresses, on which another user's process listens."""
    seen = []

    def drain(request, context):
        seen.append((context.peer(), dict(context.invocation_metadata()).get("authorization")))
        return admin_pb2.DrainWorkerResponse()

    token = ClusterToken.random()
    handler = grpc.unary_unary_rpc_method_handler(
        drain, admin_pb2.DrainWorkerRequest.FromString, lambda answer: answer.SerializeToString()
    )
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_registered_method_handlers("diptych.v1.AdminService", {"DrainWorker": handler})
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    found = f"127.0.0.1:{port}", token
    monkeypatch.setattr(blocking, "local_coordinator", lambda address: found)
    try:
        with Client(f"127.0.0.2:{port}") as client:
            client.drain("decode-0", timeout_s=10)
    finally:
        server.stop(None)
    assert [value for _, value in seen] == [token.metadata[0][1]]
