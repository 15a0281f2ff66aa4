"""The stubs by which gateways speak to vLLM's engine, from the package that defines them."""

from __future__ import annotations

import sys

from tests.ecosystem.client import Client, Target
from tests.ecosystem.environments import Environment
from tests.ecosystem.runner import main


def check(target: Target, environment: Environment) -> str:
    return environment.script("engine_calls.py", target.grpc, target.model)


CLIENT = Client("engine-protocol", "smg-grpc-proto", check, ("smg-grpc-proto==0.4.28",))

if __name__ == "__main__":
    sys.exit(main(only=[CLIENT.name]))
