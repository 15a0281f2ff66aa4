"""LangChain's OpenAI integration: chat, streams, chains, asyncio, structured output, tools."""

from __future__ import annotations

import sys

from tests.ecosystem.client import Client, Target
from tests.ecosystem.environments import Environment
from tests.ecosystem.runner import main


def check(target: Target, environment: Environment) -> str:
    return environment.script("langchain_calls.py", target.url, target.model)


CLIENT = Client("langchain", "langchain-openai", check, ("langchain-openai==1.7.4",))

if __name__ == "__main__":
    sys.exit(main(only=[CLIENT.name]))
