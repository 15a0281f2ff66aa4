"""Triton's own Python client, blocking and asyncio: the oracle of the Open Inference Protocol."""

from __future__ import annotations

import sys

from tests.ecosystem.client import Client, Target
from tests.ecosystem.environments import Environment
from tests.ecosystem.runner import main


def check(target: Target, environment: Environment) -> str:
    return environment.script("triton_calls.py", target.grpc, target.model)


# It asks for protobuf below 7, and its messages have the names of ours.
CLIENT = Client("tritonclient", "tritonclient", check, ("tritonclient[grpc]==2.73.0",))

if __name__ == "__main__":
    sys.exit(main(only=[CLIENT.name]))
