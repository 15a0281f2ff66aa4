"""One client of the ecosystem: where it lives and what it is asked to do.

Each module beside this one that defines `CLIENT` is such a client, and a command:
`python -m tests.ecosystem.tritonclient`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.ecosystem.environments import Environment


@dataclass(frozen=True)
class Target:
    """A running stack."""

    grpc: str  # HOST:PORT
    http: str  # HOST:PORT
    model: str  # as it is served
    folder: Path  # the checkpoint, in Hugging Face layout: clients count tokens with its tokenizer

    @property
    def url(self) -> str:
        """Where the OpenAI API is, without /v1."""
        return f"http://{self.http}"


@dataclass(frozen=True)
class Client:
    """`check` does something whole with the target and returns what; it raises where that fails."""

    name: str
    distribution: str  # whose version is reported
    check: Callable[[Target, Environment], str]
    packages: tuple[str, ...] = ()  # none: the project's own environment
    environment: str = ""  # the name of its folder; "": the client's

    def prepare(self) -> Environment:
        """Its environment, made if need be. Raises LeftOut."""
        if not self.packages:
            return Environment.own()
        return Environment.make(self.environment or self.name, self.packages)
