"""OpenAI's Python client, blocking and asyncio: whole and streamed answers and all options."""

from __future__ import annotations

import sys

from tests.ecosystem.client import Client, Target
from tests.ecosystem.environments import Environment
from tests.ecosystem.runner import main


def check(target: Target, environment: Environment) -> str:
    return environment.script("openai_calls.py", target.url, target.model)


CLIENT = Client("openai", "openai", check, ("openai==3.57.0",))

if __name__ == "__main__":
    sys.exit(main(only=[CLIENT.name]))
