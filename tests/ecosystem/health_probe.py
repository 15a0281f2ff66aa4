"""What grpc_health_probe and Kubernetes do: Check and Watch, of the server and each service."""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.ecosystem.client import Client, Target
from tests.ecosystem.environments import Environment
from tests.ecosystem.reflection import Walker
from tests.ecosystem.runner import main

SERVING = health_pb2.HealthCheckResponse.SERVING
# They have no health of their own.
_WITHOUT = ("grpc.health.", "grpc.reflection.")
TIMEOUT_S = 10.0


def probe(address: str) -> str:
    """Ask for all there is; returns what was asked."""
    with grpc.insecure_channel(address) as channel:
        names = sorted(
            name
            for name in Walker(channel, "grpc.reflection.v1").services()
            if not name.startswith(_WITHOUT)
        )
        assert names, "a server without services"
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", *names):
            request = health_pb2.HealthCheckRequest(service=name)
            assert stub.Check(request, timeout=TIMEOUT_S).status == SERVING, name
            watch = stub.Watch(request, timeout=TIMEOUT_S)
            assert next(watch).status == SERVING, name
            watch.cancel()
        unknown = health_pb2.HealthCheckRequest(service="no.such.Service")
        try:
            stub.Check(unknown, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.NOT_FOUND, error.code()
        else:
            raise AssertionError("an unknown service has a status")
    return f"Check and Watch of the server and of {', '.join(names)}"


def check(target: Target, environment: Environment) -> str:
    return probe(target.grpc)


CLIENT = Client("health-probe", "grpcio-health-checking", check)

if __name__ == "__main__":
    sys.exit(main(only=[CLIENT.name]))
