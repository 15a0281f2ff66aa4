"""KServe's own client: what its `grpc-v2` protocol expects of a server."""

from __future__ import annotations

import sys

from tests.ecosystem.client import Client, Target
from tests.ecosystem.environments import Environment
from tests.ecosystem.runner import main


def check(target: Target, environment: Environment) -> str:
    return environment.script("kserve_calls.py", target.grpc, target.model)


CLIENT = Client("kserve", "kserve", check, ("kserve==0.21.0",))

if __name__ == "__main__":
    sys.exit(main(only=[CLIENT.name]))
